"""Asking a trained model: continue prompts (`generate`), fill a hole (`infill`) or masks (`denoise`), score given tokens (`score`). Ids in,
ids or nats out.

Choices: prompts of unequal length are padded on the left in a segment of their own, so a row of a batch gives the tokens it gives alone;
draws invert the cumulative distribution with one uniform number per row and step from a generator per prompt, so they too do not depend
on the rest of the batch; everything runs in evaluation mode without gradients, and the training mode is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heads_lightning.backbones.base import Backbone
from heads_lightning.batch import IGNORE, PADDING, Attention, Batch

Draw = Callable[[Tensor], Tensor]
"""fp32 logits [B, V] to ids [B]."""


def generate(
    backbone: Backbone,
    head: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    forbidden_ids: Sequence[int] = (),
    attention: Attention = Attention.causal,
    decoder_prompts: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new ids of each, without the stop id. An answer shorter than max_new_tokens was stopped.

    Args:
        backbone, head: the model. The head gives logits [B, 1, V] for `head(hidden, logits_to_keep=1)`.
        prompts: ids, at least one each.
        max_new_tokens: longest answer.
        stop_ids: ids that end an answer.
        temperature: 0 takes the most likely id; otherwise logits are divided by it.
        top_k: draw from the k most likely ids. None: all.
        top_p: draw from the likeliest ids that together reach this probability (arXiv 1904.09751). None: all.
        generator: of the draws, on any device; advanced once, whatever is drawn. None: seeded with 0. Each prompt draws from a stream of
            its own, which depends on its place in the list and not on the other prompts.
        forbidden_ids: ids that are never produced.
        attention: causal; prefix to read each prompt bidirectionally; encoder_decoder for an encoder that reads the prompts.
        decoder_prompts: with attention=encoder_decoder, what the decoder of each prompt has written so far, its start token at least; with
            attention=prefix, what was written after each prompt.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    batch = _first_batch(prompts, decoder_prompts, attention, backbone.embedding.weight.device)
    draw = _drawing(len(prompts), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, forbidden_ids=forbidden_ids)
    goes_on = Attention.causal if attention == Attention.prefix else attention
    stops = set(stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    with reading_mode(backbone, head):
        cache = backbone.new_cache(len(prompts), batch.tokens_BS.shape[1] + max_new_tokens - 1)
        for _ in range(max_new_tokens):
            hidden_BSD = backbone(batch, cache)
            ids_B = draw(head(hidden_BSD, logits_to_keep=1)[:, -1].float())
            for row, token in enumerate(ids_B.tolist()):
                if row in running and token in stops:
                    running.remove(row)
                elif row in running:
                    answers[row].append(token)
            if not running:
                break
            batch = _batch(ids_B[:, None], goes_on)
    return answers


def infill(
    backbone: Backbone,
    head: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    fim_end: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    forbidden_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The middle that fits each infilling prompt (`objectives.fim_layout.fim_prompt`), up to the end-of-middle token `fim_end`."""
    return generate(
        backbone,
        head,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=(fim_end,),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        forbidden_ids=[i for i in forbidden_ids if i != fim_end],
    )


def denoise(
    backbone: Backbone,
    head: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    mask: int,
    steps: int,
    temperature: float = 0.0,
    seed: int = 0,
    forbidden_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Fill the masks of each row in a number of passes: each keeps the tokens that the model is surest of and asks again for the rest
    (MaskGIT, arXiv 2202.04200, section 3.2; LLaDA, arXiv 2502.09992, algorithm 5).

    Args:
        backbone, head: the model, which reads from both sides.
        rows: ids, some of them `mask`; rows are read one by one, so that none depends on another.
        mask: id of the mask token; never produced.
        steps: passes, at most one a mask; each keeps an even share of the masks.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from the logits divided by it.
        seed: of the draws.
        forbidden_ids: ids that are never produced.
    """
    if steps < 1 or temperature < 0:
        raise ValueError(f"steps={steps}, temperature={temperature}: allowed are 1 or more, and 0 or more")
    device, forbidden = backbone.embedding.weight.device, [*forbidden_ids, mask]
    filled = []
    with reading_mode(backbone, head):
        for number, row in enumerate(rows):
            tokens_S = torch.tensor(list(row), device=device)
            generator = torch.Generator().manual_seed(seed + number)
            count = int((tokens_S == mask).sum())
            passes = min(steps, count)
            for done in range(passes):
                hidden_N = (tokens_S == mask).nonzero()[:, 0]
                logits_NV = head(backbone(_batch(tokens_S[None], Attention.bidirectional)), logits_to_keep=hidden_N)[0].float()
                logits_NV[:, forbidden] = float("-inf")
                ids_N, sure_N = _choose(logits_NV, temperature, generator)
                keep = count * (done + 1) // passes - count * done // passes
                best = sure_N.topk(keep).indices
                tokens_S[hidden_N[best]] = ids_N[best]
            filled.append(tokens_S.tolist())
    return filled


def _choose(logits_NV: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An id for every hidden position, and the probability that the model gives it."""
    p_NV = logits_NV.softmax(dim=-1)
    if temperature == 0:
        sure_N, ids_N = p_NV.max(dim=-1)
        return ids_N, sure_N
    uniform_N = torch.rand(len(logits_NV), generator=generator).to(logits_NV.device)
    ids_N = _sample(logits_NV / temperature, uniform_N, top_k=None, top_p=None)
    return ids_N, p_NV.gather(1, ids_N[:, None])[:, 0]


def score(
    backbone: Backbone,
    head: nn.Module,
    tokens: Sequence[Sequence[int]],
    targets: Sequence[Sequence[bool]],
    *,
    positions_per_batch: int = 8192,
) -> list[float]:
    """Summed negative log-likelihood, in nats, of the marked ids of each sequence given everything before them.

    Args:
        backbone, head: the model. The head gives `.ce_loss` [B, S] for `head(hidden, labels=…, loss_reduction="none")`.
        tokens: ids of each sequence.
        targets: for each id whether it counts; the first of a sequence cannot, for nothing stands before it.
        positions_per_batch: padded positions of one forward pass.
    """
    for ids, marks in zip(tokens, targets, strict=True):
        if len(ids) != len(marks) or (len(marks) and marks[0]):
            raise ValueError("targets need one mark for each id, and the first id of a sequence cannot be a target")
    totals = [0.0] * len(tokens)
    with reading_mode(backbone, head):
        for rows in _by_length([len(ids) for ids in tokens], positions_per_batch):
            batch = _scoring_batch([tokens[r] for r in rows], [targets[r] for r in rows], backbone.embedding.weight.device)
            losses_BS = head(backbone(batch), labels=batch.labels_BS, loss_reduction="none").ce_loss
            for row, total in zip(rows, losses_BS.cpu().double().sum(dim=1).tolist(), strict=True):
                totals[row] = total
    return totals


@contextmanager
def reading_mode(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own mode back."""
    training = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _batch(tokens_BS: Tensor, attention: Attention, **fields: Tensor | None) -> Batch:
    """A batch to read, without targets."""
    return Batch(tokens_BS, torch.full_like(tokens_BS, IGNORE), attention, num_targets=0, step_targets=0, **fields)  # pyright: ignore[reportArgumentType]


def _first_batch(
    prompts: Sequence[Sequence[int]], decoder_prompts: Sequence[Sequence[int]] | None, attention: Attention, device: torch.device
) -> Batch:
    """All prompts, to be read at once."""
    if attention == Attention.prefix:
        written = [[] for _ in prompts] if decoder_prompts is None else decoder_prompts
        tokens_BS, segments_BS = _pad_left([[*p, *w] for p, w in zip(prompts, written, strict=True)], device)
        ends_B1 = tokens_BS.shape[1] - torch.tensor([len(w) for w in written], device=device)[:, None]
        prefix_BS = torch.arange(tokens_BS.shape[1], device=device) < ends_B1
        return _batch(tokens_BS, attention, segments_BS=segments_BS, prefix_BS=prefix_BS)
    tokens_BS, segments_BS = _pad_left(prompts, device)
    if attention != Attention.encoder_decoder:
        return _batch(tokens_BS, attention, segments_BS=segments_BS)
    if decoder_prompts is None or len(decoder_prompts) != len(prompts):
        raise ValueError("attention=encoder_decoder needs one decoder prompt for each prompt: its start token at least")
    written_BS, written_segments_BS = _pad_left(decoder_prompts, device)
    return _batch(written_BS, attention, segments_BS=written_segments_BS, encoder_tokens_BT=tokens_BS, encoder_segments_BT=segments_BS)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids [B, S] that end together, and their segments: None when nothing is padded, which is faster to read."""
    lengths = [len(p) for p in prompts]
    if min(lengths) == 0:
        raise ValueError("an empty prompt cannot be continued; begin it with the end-of-document token, which opens a document")
    longest = max(lengths)
    tokens_BS = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if min(lengths) == longest:
        return tokens_BS, None
    padded_BS = torch.arange(longest, device=device) < longest - torch.tensor(lengths, device=device)[:, None]
    return tokens_BS, torch.where(padded_BS, PADDING, 0)


def _drawing(
    rows: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    forbidden_ids: Sequence[int],
) -> Draw:
    """How the next id of each row is chosen."""
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: allowed are 0 or more, 1 or more, and 0 < top_p <= 1")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    forbidden = list(forbidden_ids)

    def draw(logits_BV: Tensor) -> Tensor:
        logits_BV[:, forbidden] = float("-inf")
        if temperature == 0:
            return logits_BV.argmax(dim=-1)
        uniform_B = torch.tensor([torch.rand((), generator=g).item() for g in generators], device=logits_BV.device)
        return _sample(logits_BV / temperature, uniform_B, top_k=top_k, top_p=top_p)

    return draw


def _sample(logits_BV: Tensor, uniform_B: Tensor, *, top_k: int | None, top_p: float | None) -> Tensor:
    """Invert the cumulative distribution over ids sorted by probability, cut to the k likeliest and to the nucleus."""
    sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_BV, ids_BV = sorted_BV[:, :top_k], ids_BV[:, :top_k]
    cumulative_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1)
    mass_B = cumulative_BV[:, -1]
    if top_p is not None:
        # the nucleus ends with the id that reaches top_p
        last_B = (cumulative_BV < top_p * mass_B[:, None]).sum(dim=-1, keepdim=True).clamp(max=cumulative_BV.shape[1] - 1)
        mass_B = cumulative_BV.gather(1, last_B)[:, 0]
    place_B = torch.searchsorted(cumulative_BV, (uniform_B * mass_B)[:, None], right=True).clamp(max=cumulative_BV.shape[1] - 1)
    return ids_BV.gather(1, place_B)[:, 0]


def _by_length(lengths: Sequence[int], positions_per_batch: int) -> Iterator[list[int]]:
    """Numbers of the sequences in groups of similar length; those without a target are left out."""
    group: list[int] = []
    for row in sorted((r for r, length in enumerate(lengths) if length > 1), key=lambda r: lengths[r]):
        if group and lengths[row] * (len(group) + 1) > positions_per_batch:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _scoring_batch(tokens: Sequence[Sequence[int]], targets: Sequence[Sequence[bool]], device: torch.device) -> Batch:
    """Rows padded on the right; position s predicts id s + 1 where that is a target."""
    longest = max(len(ids) for ids in tokens) - 1
    shape = (len(tokens), longest)
    tokens_BS, labels_BS = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    segments_BS = torch.full(shape, PADDING, dtype=torch.int32)
    for row, (ids, marks) in enumerate(zip(tokens, targets, strict=True)):
        whole, count = torch.tensor(list(ids)), len(ids) - 1
        tokens_BS[row, :count] = whole[:-1]
        labels_BS[row, :count] = torch.where(torch.tensor(list(marks), dtype=torch.bool)[1:], whole[1:], IGNORE)
        segments_BS[row, :count] = 0
    num_targets = int((labels_BS != IGNORE).sum())
    batch = Batch(tokens_BS, labels_BS, Attention.causal, num_targets, num_targets, segments_BS=segments_BS)
    return batch.to(device)
