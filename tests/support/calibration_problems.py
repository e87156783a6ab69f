"""Matrices, and inputs whose products they are to keep, for the methods that choose integers by them."""

import numpy as np
import torch
from binary_models import make_checkpoint

from baichuan.calibration.weight_only import quantise_layers
from baichuan.config import WeightOnly
from baichuan.quant.moments import InputMoments

CHANNELS, TOKENS = 64, 300
FORM = WeightOnly("int4", 32)


def problem(rows=24, tokens=TOKENS, seed=0):
    """A matrix, and inputs whose channels differ in size and follow one another."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((CHANNELS, CHANNELS)) + 2 * np.eye(CHANNELS)
    x = rng.standard_normal((tokens, CHANNELS)) @ mixed * rng.gamma(1, 1, CHANNELS)
    x[:, 5] = 0  # an input that the texts never use
    w = rng.standard_normal((rows, CHANNELS)) * rng.gamma(1, 1, (rows, 1))
    w[3] = 0
    return torch.from_numpy(w).float(), torch.from_numpy(x.T @ x / tokens).float()


def moments(hessian, tokens=TOKENS):
    """Moments of inputs that are those of the float model."""
    return InputMoments(hessian, torch.zeros_like(hessian), tokens)


def objective(w, values, hessian):
    """The error that GPTQ makes small, in float64: sum over rows of (w - v) H (w - v)ᵀ."""
    left = w.double().numpy() - np.asarray(values, np.float64)
    return float(np.einsum("ri,ij,rj->", left, hessian.double().numpy(), left))


def moments_of(x, e):
    products = (torch.from_numpy(left.T @ x / len(x)).float() for left in (x, e - x))
    return InputMoments(*products, len(x))


def found_integers(model, samples, folder, form=FORM, method="gptq"):
    """(integers, grid) by layer and linear."""
    found = {}
    quantise_layers(
        make_checkpoint(model),
        model,
        samples,
        folder,
        "cpu",
        form,
        method,
        lambda layer, name, q, grid: found.__setitem__((layer, name), (q, grid)),
    )
    return found


def inputs_of(hf, name, samples):
    """What goes into a module: [tokens, in_features] float64."""
    seen = []
    handle = hf.get_submodule(name).register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0].flatten(0, -2))
    )
    with torch.inference_mode():
        for sample in samples:
            hf(torch.tensor([sample]))
    handle.remove()
    return torch.cat(seen).double().numpy()
