"""Liger's kernel in Triton's interpreter, on any machine: the contract tests of fused_linear, and the traps that it routes around.

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
