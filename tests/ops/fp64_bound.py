"""The accuracy bound that every op's output and gradients must keep."""

import torch


def outputs_and_gradients(function, inputs, dout, dtype):
    """[output, gradient of each input] of `function`, each input in dtype(input)."""
    leaves = [x.detach().to(dtype(x)).requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, dout.expand(out.shape).to(out.dtype))
    return [out.detach(), *gradients]


def worst_ratio(got, ref, gold):
    """Error of got as a share of what is allowed: 2 |ref - gold| + 4 eps_fp32 max(1, |gold|), in maximum norm."""
    if got.numel() == 0:
        return 0.0
    error, plain = ((x.double() - gold).abs().max().item() for x in (got, ref))
    return error / (2 * plain + 4 * torch.finfo(torch.float32).eps * max(1.0, gold.abs().max().item()))


def check_against_fp64(op, reference, inputs, dout=None):
    """Check output and every gradient of `op` against `reference` in float64.

    inputs: leaves in the tested dtypes, differentiated all. dout: gradient of the output; standard normal if None.
    """
    if dout is None:
        with torch.no_grad():
            dout = torch.randn(op(*inputs).shape, device=inputs[0].device)
        dout = dout.to(inputs[0].dtype)  # the same rounded values for all three
    got, ref = (outputs_and_gradients(f, inputs, dout, lambda x: x.dtype) for f in (op, reference))
    gold = outputs_and_gradients(reference, inputs, dout, lambda x: torch.float64)
    for name, *results in zip(["output", *(f"gradient {i}" for i in range(len(inputs)))], got, ref, gold):
        assert results[0].shape == results[1].shape, name
        assert results[0].dtype == results[1].dtype, name
        ratio = worst_ratio(*results)
        assert ratio <= 1, f"{name}: {ratio:.2f} of the allowed error"
