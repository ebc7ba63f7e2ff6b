"""Stage 4 on the kernels: choices, the gated shared path, mask and crop, and their gradients."""

import pytest
import torch
from stage_runs import DTYPES, check_accuracy, check_exactness, draw, run_stage

from segmoe_kernels.functional import combine

pytest.importorskip("triton")


def make_stage(mask=None):
    def stage(expert_out, shared_out=None, gate_logits=None, *, backend):
        y = combine(expert_out, shared_out, gate_logits, padding_mask=mask, backend=backend)
        return {"y": y}

    return stage


def make_tensors(
    batch, length, d_model, *, choices=2, steps=3, dtype=torch.float64, device="cpu", mask=None
):
    """``steps`` in a row of the shared path; 0 for none."""
    options = {"dtype": dtype, "device": device}
    tensors = {"expert_out": draw(choices, batch, length, d_model, **options)}
    if mask is not None:
        tensors["expert_out"].masked_fill_(~mask[..., None], 0)
    if steps:
        rows = -(-length // steps)
        tensors["shared_out"] = draw(batch, rows, steps * d_model, **options)
        tensors["gate_logits"] = draw(batch, rows, **options)
    return tensors


def make_mask(batch, length, device="cpu"):
    mask = torch.rand(batch, length) < 0.6
    mask[:, -1] = False
    return mask.to(device)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("steps", [0, 1, 3, 8, 20], ids=lambda s: f"steps={s}")
@pytest.mark.parametrize("choices", [1, 3])
def test_combine_equals_reference_in_float64(choices, steps, masked, device):
    mask = make_mask(2, 8, device) if masked else None
    tensors = make_tensors(2, 8, 5, choices=choices, steps=steps, device=device, mask=mask)
    check_exactness(make_stage(mask), tensors, rtol=1e-14)


# One program takes 4096 // padded(D) steps: 16 at 256 columns, 8 at 512 in two tiles.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "d_model", "steps"),
    [(1, 1, 1, 1), (3, 5, 7, 2), (1, 15, 255, 4), (1, 16, 256, 4), (1, 17, 257, 1), (4, 66, 64, 5)],
    ids=str,
)
def test_combine_is_as_accurate_as_eager(batch, length, d_model, steps, dtype, device):
    mask = make_mask(batch, length, device)
    tensors = make_tensors(
        batch, length, d_model, steps=steps, dtype=dtype, device=device, mask=mask
    )
    check_accuracy(make_stage(mask), tensors)


def test_combine_of_one_choice_alone_launches_nothing(device):
    out = draw(1, 2, 5, 3, device=device)
    y = combine(out, backend="triton")
    assert y.data_ptr() == out.data_ptr()
    assert torch.equal(y, out[0])


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_combine_of_nothing(steps, shape, device):
    check_exactness(make_stage(), make_tensors(*shape, steps=steps, device=device))


def test_combine_never_reads_cropped_or_masked_shared_rows(device):
    mask = make_mask(2, 7, device)
    tensors = make_tensors(2, 7, 4, dtype=torch.float32, device=device, mask=mask)
    upstream = {}
    clean = run_stage(make_stage(mask), tensors, upstream=upstream)
    hidden = torch.ones(2, 9, dtype=torch.bool, device=device)
    hidden[:, :7] = ~mask
    dirty = tensors["shared_out"].view(2, 9, 4).masked_fill(hidden[..., None], torch.nan)
    # What comes back for a masked step is no better.
    upstream["y"] = upstream["y"].masked_fill(~mask[..., None], torch.nan)
    actual = run_stage(
        make_stage(mask), {**tensors, "shared_out": dirty.view(2, 3, 12)}, upstream=upstream
    )
    for name in ("y", "dshared_out", "dgate_logits"):
        assert torch.equal(actual[name], clean[name]), name
    assert not actual["dshared_out"].view(2, 9, 4)[hidden].any()
    assert not actual["y"][~mask].any()


def test_combine_of_a_segment_without_a_real_step_has_no_gradient(device):
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[1, 3:] = False
    tensors = make_tensors(2, 6, 4, device=device, mask=mask)
    out = check_exactness(make_stage(mask), tensors, rtol=1e-14)
    assert out["dgate_logits"][1, 1] == 0
    assert out["dgate_logits"][0].all()


def test_combine_saturates_its_gate(device):
    tensors = make_tensors(1, 4, 4, steps=1, dtype=torch.float32, device=device)
    tensors["gate_logits"] = torch.tensor([[-200.0, 200.0, 0.0, -90.0]], device=device)
    out = check_accuracy(make_stage(), tensors)
    both = tensors["expert_out"].sum(0)
    assert torch.equal(out["y"][0, 0], both[0, 0])
    torch.testing.assert_close(out["y"][0, 1], both[0, 1] + tensors["shared_out"][0, 1])
