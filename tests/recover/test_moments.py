"""What consumers read, against torch; moments against numpy; running in parts against running whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mm_edge.graph.export import export_raw
from mm_edge.graph.partial import Frontier, RunnableGraph, narrowest
from mm_edge.recover.closed_form.consumers import Consumer, columns, count_positions, input_of, read_consumers
from mm_edge.recover.closed_form.moments import Accumulator, collect_dense, sample_positions

CONVOLUTIONS = {
    "1x1": nn.Conv2d(4, 6, 1),
    "strided 1x1": nn.Conv2d(4, 6, 1, stride=2),
    "3x3": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "uneven": nn.Conv2d(4, 6, (3, 1), padding=(0, 2)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 4, 5, groups=4, padding=2),
    "transposed": nn.ConvTranspose2d(4, 6, 3, padding=1),
    "transposed 1x1": nn.ConvTranspose2d(4, 6, 1),
    "transposed by 2": nn.ConvTranspose2d(4, 6, 2, stride=2),
    "transposed, overlapping": nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    "transposed, uneven": nn.ConvTranspose2d(
        4, 6, (3, 5), stride=(3, 2), padding=(0, 2), output_padding=(1, 0), dilation=2
    ),
}


def _graph(module: nn.Module, shape: tuple[int, ...]) -> tuple[RunnableGraph, tuple[Consumer, ...]]:
    raw = export_raw(module.eval(), torch.zeros(1, *shape))
    graph = RunnableGraph(raw.model.clone())
    return graph, read_consumers(raw, graph)


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_weights_times_columns_are_the_convolution(name: str) -> None:
    module = CONVOLUTIONS[name]
    graph, (consumer,) = _graph(module, (4, 9, 7))
    image = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    assert module.bias is not None
    with torch.no_grad():
        expected = module(image).numpy() - module.bias.detach().numpy()[:, None, None]
    total = count_positions(graph, consumer)
    assert total == expected[0, 0].size
    read = columns(image.numpy(), consumer, np.arange(total))
    blocks = consumer.matrix(graph.arrays[consumer.weight])
    found = np.einsum("pgk,gok->pgo", read, blocks).reshape(total, -1)
    np.testing.assert_allclose(found, expected[0].reshape(expected.shape[1], -1).T, atol=1e-5)
    np.testing.assert_array_equal(
        consumer.weight_of(blocks, graph.arrays[consumer.weight]), module.weight.detach().numpy()
    )


def test_linear_layers_on_tokens_are_read_by_token() -> None:
    module = nn.Sequential(nn.Flatten(2), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3, bias=False))
    _, (first, second) = _graph(module, (4, 2, 3))
    assert (first.weight, second.weight) == ("1.weight", "3.weight")
    assert first.shift is not None and first.shift.tensor == "1.bias"
    assert second.shift is None
    data = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    np.testing.assert_array_equal(columns(data, first, np.array([2, 0]))[:, 0], data[0, [2, 0]])


def test_accumulated_moments_are_the_covariance() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((3000, 2, 5)).astype(np.float32) + 3
    wanted = generator.standard_normal((3000, 8)).astype(np.float32)
    sums = Accumulator()
    for start in range(0, 3000, 130):
        sums.add(inputs[start : start + 130], wanted[start : start + 130])
    found = sums.finish()
    for group in range(2):
        both = np.concatenate([inputs[:, group], wanted[:, 4 * group : 4 * group + 4]], axis=1)
        expected = np.cov(both.T, bias=True)
        np.testing.assert_allclose(found.covariance[group], expected[:5, :5], atol=2e-5)
        assert found.cross is not None
        np.testing.assert_allclose(found.cross[group], expected[:5, 5:], atol=2e-5)
        np.testing.assert_allclose(found.mean[group], inputs[:, group].mean(axis=0), atol=1e-5)


def test_sampled_positions_are_the_same_each_time_and_differ_between_images() -> None:
    graph, (consumer,) = _graph(nn.Conv2d(4, 6, 1), (4, 20, 20))
    first = sample_positions(graph, consumer, 3)
    assert len(set(first.tolist())) == 49
    np.testing.assert_array_equal(first, sample_positions(graph, consumer, 3))
    assert set(first.tolist()) != set(sample_positions(graph, consumer, 4).tolist())


def test_running_in_parts_equals_running_whole() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    graph, consumers = _graph(module, (3, 8, 8))
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8), dtype=np.float32)
    (output,) = graph.outputs
    frontier = Frontier(graph, images, (1, 3, 4))
    for consumer in consumers[1:]:
        at = graph.position(consumer.node)
        frontier.advance_(graph, narrowest(graph, frontier.position, at))
    assert frontier.position > 0
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    for number, values in frontier.run(graph, (output,), (4, 1)):
        np.testing.assert_allclose(values[output][0], expected[number], atol=1e-5)


def test_dense_moments_pair_inputs_with_what_follows() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph, consumers = _graph(module, (3, 6, 6))
    images = np.random.default_rng(0).standard_normal((5, 3, 6, 6), dtype=np.float32)
    dense = collect_dense(graph, consumers, Frontier(graph, images, range(5)), (0, 2, 4))
    last = consumers[-1]
    with torch.no_grad():
        hidden = module[1](module[0](torch.from_numpy(images[[0, 2, 4]]))).permute(0, 2, 3, 1).reshape(-1, 8).numpy()
        answers = module(torch.from_numpy(images[[0, 2, 4]])).permute(0, 2, 3, 1).reshape(3, 16, 4).numpy()
    np.testing.assert_allclose(dense.moments[last.node].covariance[0], np.cov(hidden.T, bias=True), atol=1e-5)
    np.testing.assert_allclose(dense.results[last.node], answers, atol=1e-5)
    assert input_of(graph, last) in graph.made_at
