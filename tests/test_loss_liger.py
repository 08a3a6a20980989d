"""Liger's and Apple's kernels in Triton's interpreter, on any machine: contract of fused_linear, the traps it routes around, and cce.

The interpreter is chosen when Triton is imported, so the tests run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heads_lightning.losses import linear_cross_entropy

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CCE = importlib.util.find_spec("cut_cross_entropy") is not None
LIGER = importlib.util.find_spec("liger_kernel") is not None and importlib.util.find_spec("triton") is not None


def pytest_in_interpreter(*arguments: str) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(not LIGER, reason="liger-kernel is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the inner process")
class TestInInterpreter:
    def test_traps(self) -> None:
        pytest_in_interpreter(str(HERE / "test_loss_liger.py"))

    @pytest.mark.slow
    @pytest.mark.parametrize("file", ["test_losses.py", "test_heads.py"])
    def test_contract(self, file: str) -> None:
        pytest_in_interpreter(str(HERE / file), "-k", "fused_linear and not compiled")


@pytest.mark.skipif(not INTERPRETED, reason="runs inside TestInInterpreter")
class TestTraps:
    """What Liger 0.8.5 itself does wrong, and that we do not. If the first half of a test fails, Liger has mended it: drop the detour."""

    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.x, self.w = torch.randn(12, 16), torch.randn(37, 16)
        self.labels = torch.randint(0, 37, (12,))
        self.labels[:3] = -100

    def liger(self, **options: object) -> torch.nn.Module:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(**options)  # pyright: ignore[reportArgumentType]

    def ours(self, implementation: str = "fused_linear", **options: object) -> torch.Tensor:
        return linear_cross_entropy(self.x, self.w, self.labels, implementation=implementation, **options).total  # pyright: ignore[reportArgumentType]

    def test_weight_alone_trains(self) -> None:
        self.w.requires_grad_()
        self.liger()(self.w, self.x, self.labels).backward()
        assert self.w.grad is None
        self.ours().backward()
        got, self.w.grad = self.w.grad, None
        self.ours("default").backward()
        torch.testing.assert_close(got, self.w.grad)

    def test_second_backward_is_refused(self) -> None:
        self.x.requires_grad_()
        loss = self.liger()(self.w, self.x, self.labels) * 2
        loss.backward(retain_graph=True)
        first, self.x.grad = self.x.grad, None
        loss.backward()
        torch.testing.assert_close(self.x.grad, 2 * first)
        loss = self.ours() * 2
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="loss_implementation=default"):
            loss.backward()

    def test_labels_are_checked(self) -> None:
        self.labels[5] = 99
        assert self.liger()(self.w, self.x, self.labels).isfinite()
        with pytest.raises(ValueError, match="label 99 at position 5"):
            self.ours()

    def test_no_z_term_unasked(self) -> None:
        plain = self.ours("default")
        assert self.liger(lse_square_scale=1e-2)(self.w, self.x, self.labels) > plain + 0.01
        torch.testing.assert_close(self.ours(), plain)
        torch.testing.assert_close(self.ours(z_loss_multiplier=0.0), plain)

    def test_liger_is_imported_only_when_it_computes(self) -> None:
        code = (
            "import sys; from heads_lightning.losses import loss_module, unavailable; "
            "loss_module('fused_linear'); unavailable('fused_linear'); "
            "assert not [m for m in sys.modules if m.startswith(('liger', 'triton'))]"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def log1p(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has none of the functions of NVIDIA's library; this is the one that cut-cross-entropy calls without a soft cap."""
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from triton.language.extra import libdevice  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(libdevice, "log1p", lambda x: tl.log(1.0 + x))


@pytest.mark.skipif(not (INTERPRETED and CCE), reason="needs cut-cross-entropy (optional, Apple's licence); runs inside TestInInterpreter")
@pytest.mark.usefixtures("log1p")
class TestCutCrossEntropy:
    """In fp16: the interpreter cannot compute in bf16, and the kernel trains in 16 bits alone."""

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("frozen", ["", "hidden", "weight"])
    @pytest.mark.parametrize("weighed", [False, True])
    def test_value_and_gradients(self, reduction: str, frozen: str, weighed: bool, caplog: pytest.LogCaptureFixture) -> None:
        torch.manual_seed(0)
        hidden, weight = torch.randn(12, 16).half(), torch.randn(40, 16).half()  # rows from 37 on are padding
        labels = torch.randint(0, 37, (12,))
        labels[:3] = -100
        weights = torch.rand(12) if weighed else None
        found = []
        for implementation in ("cce", "default"):
            leaves = {
                name: tensor.detach().to(torch.float16 if implementation == "cce" else torch.float32).requires_grad_(name != frozen)
                for name, tensor in (("hidden", hidden), ("weight", weight))
            }
            loss = linear_cross_entropy(
                leaves["hidden"],
                leaves["weight"],
                labels,
                weights=weights,
                num_classes=37,
                implementation=implementation,
                reduction=reduction,
            )  # pyright: ignore[reportCallIssue]
            loss.total.square().sum().backward()
            found.append([loss.total.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)])
        assert not [r for r in caplog.records if "does not do" in r.getMessage()]
        assert len(found[0]) == (3 if not frozen else 2)
        for ours, theirs in zip(*found, strict=True):
            assert (ours.float() - theirs).norm() <= 3e-3 * theirs.norm()
        assert not found[0][-1][37:].any() or frozen == "weight"

    @pytest.mark.parametrize("what", ["float32", "bias", "z_loss"])
    def test_what_it_lacks_is_computed_by_chunked(self, what: str, caplog: pytest.LogCaptureFixture) -> None:
        dtype = torch.float32 if what == "float32" else torch.float16
        hidden, weight, labels = torch.randn(5, 16).to(dtype), torch.randn(9, 16).to(dtype), torch.arange(5)
        options = {"bias": {"bias": torch.zeros(9)}, "z_loss": {"z_loss_multiplier": 1e-2}}.get(what, {})
        got, want = (linear_cross_entropy(hidden, weight, labels, implementation=i, **options).total for i in ("cce", "chunked"))
        assert torch.equal(got, want)
        assert f"cce does not do {what};" in caplog.text

    def test_no_rows(self) -> None:
        hidden = torch.randn(5, 16).half().requires_grad_()
        loss = linear_cross_entropy(hidden, torch.randn(9, 16).half(), torch.full((5,), -100), implementation="cce").total
        loss.backward()
        assert loss.item() == 0
        assert hidden.grad is not None
        assert not hidden.grad.any()
