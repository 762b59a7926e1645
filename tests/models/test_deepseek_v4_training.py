"""The gradients of the DeepSeek V4 model against torch's, and what of it is trained."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers
from reference_v4 import CONFIG, CONFIGS, Torch, to_ours, tokens

from mla_tools.models import deepseek_v4
from mla_tools.models.deepseek_v4 import Model, ModelArgs

# Of each kind of layer one that hashes tokens and one that does not; the last has no choice of entries.
KEYS = {"num_hidden_layers": 4, "num_hash_layers": 2, "compress_ratios": [0, 4, 128, 4]}
LENGTH = 135


def test_gradients_of_all_parameters_are_those_of_torch() -> None:
    source = Torch({**CONFIGS["yarn"], **KEYS})
    model = Model(ModelArgs.from_dict(source.config))
    model.load_weights([(name, mx.array(array)) for name, array in source.weights.items()])
    ids, weights = tokens(LENGTH), np.random.default_rng(0).standard_normal((LENGTH, CONFIG["vocab_size"]))
    weights = (weights / LENGTH).astype(np.float32)

    def loss(model: Model) -> mx.array:
        return (model(mx.array([ids]))[0] * mx.array(weights)).sum()

    value, found = nn.value_and_grad(model, loss)(model)
    logits = source.model(torch.tensor([ids]), use_cache=False).logits[0]
    truth = (logits * torch.tensor(weights)).sum()
    truth.backward()
    assert float(value) == pytest.approx(truth.item(), rel=1e-5)
    named = source.model.named_parameters()
    state = {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in named}
    expected = to_ours(state, source.config)
    gradients = {name: np.array(array) for name, array in tree_flatten(found)}
    # A buffer of transformers: it takes part in the choice alone.
    biases = {name for name in gradients if name.endswith("e_score_correction_bias")}
    assert gradients.keys() == expected.keys() | biases
    assert len(biases) == 2
    for name, gradient in gradients.items():
        if name in biases or ".indexer." in name:
            assert not gradient.any(), name
            assert name in biases or not expected[name].any(), name
        else:
            # The worst is 2e-5, where many terms cancel each other.
            assert np.abs(gradient - expected[name]).max() < 1e-4 * np.abs(expected[name]).max(), name


def test_the_gradient_of_the_kernel_is_that_of_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = deepseek_v4.plain_sinkhorn
    calls = []

    def kernel(matrices: mx.array, iterations: int, eps: float) -> mx.array:
        calls.append(matrices.shape)
        return mx.stop_gradient(plain(matrices, iterations, eps))

    rng = np.random.default_rng(0)
    matrices, weights = (mx.array(rng.random((3, 4, 4), dtype=np.float32)) for _ in range(2))
    expected = mx.grad(lambda x: (plain(x, 5, 1e-6) * weights).sum())(matrices)
    monkeypatch.setattr(deepseek_v4, "SINKHORN", kernel)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    found = mx.grad(mx.compile(lambda x: (deepseek_v4.sinkhorn(x, 5, 1e-6) * weights).sum()))(matrices)
    assert calls
    assert mx.allclose(found, expected, atol=1e-6)


def small() -> Model:
    model = Model(ModelArgs.from_dict({**CONFIG, **KEYS}))
    model.update({"model": {"embed_tokens": {"weight": mx.random.normal((320, 64))}}})
    return model


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
def test_adapters_in_a_compiled_step(checkpoints: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    model.freeze()
    linear_to_lora_layers(model, 4, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    if checkpoints:
        monkeypatch.setattr(deepseek_v4.Block, "__call__", deepseek_v4.Block.__call__)
        grad_checkpoint(model.layers[0])
    step = nn.value_and_grad(model, lambda model, ids: model(ids).square().mean())
    value, found = mx.compile(lambda ids: step(model, ids), inputs=[model.state])(mx.array([tokens(40)]))
    assert np.isfinite(float(value))
    assert all("lora" in name for name, _ in tree_flatten(found))


def test_the_experts_of_a_token_are_never_trained() -> None:
    model = small()
    model.freeze()
    for layer in copy.deepcopy(model).layers + model.layers:
        layer.unfreeze()
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert "model.layers.0.ffn.gate.weight" in names
    assert "model.layers.3.ffn.gate.e_score_correction_bias" in names
    assert not any(name.endswith("tid2eid") for name in names)
    assert "model.layers.0.ffn.gate.tid2eid" in dict(tree_flatten(model.parameters()))
