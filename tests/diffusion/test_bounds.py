"""What is said of a layer's inputs holds for the worst of them, and is not far from it."""

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from diffusion.bounds import input_bounds, of_gate, of_norm
from diffusion.float8 import E4M3, LARGEST, Float8Layers
from diffusion.fused import fuse_projections
from tests.diffusion.support import build
from tests.support.small_families import write_small_sd3

WIDTH = 64
# What float32 loses on its way.
SLACK = 1 + 1e-4


@pytest.fixture(autouse=True)
def numbers() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def norm_of(*, bias: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH)
    norm.weight.normal_()
    norm.bias.normal_().mul_(bias)
    return norm


def block_of(**changes: object) -> BasicTransformerBlock:
    block = BasicTransformerBlock(WIDTH, 4, WIDTH // 4, cross_attention_dim=32, **changes)
    for part in block.modules():
        if isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            part.weight.normal_()
            part.bias.normal_()
    return block


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_nothing_that_leaves_a_norm_exceeds_its_bound_and_something_comes_near(bias):
    norm = norm_of(bias=bias)
    alone = torch.eye(WIDTH)
    inputs = torch.cat([torch.randn(1000, WIDTH), alone * 1e4, alone * -1e4])

    reached = norm(inputs).abs().amax(dim=0)

    assert (0.9 * of_norm(norm) <= reached).all()
    assert (reached <= SLACK * of_norm(norm)).all()


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.5), (1.0, 0.1)])
def test_nothing_that_leaves_a_gate_exceeds_its_bound_and_something_comes_near(bias, share):
    norm, projection = norm_of(bias=bias), nn.Linear(WIDTH, 2 * 16)
    projection.bias.mul_(bias)
    values, gates = (projection.weight * norm.weight).chunk(2)
    of_values, of_gates = (one / one.norm(dim=1, keepdim=True) for one in (values, gates))
    # The two directions in which a product of two projections is largest.
    worst = torch.cat([of_values + of_gates, of_values - of_gates])
    inputs = torch.cat([torch.randn(1000, WIDTH), worst, -worst])

    of_projection, gate = projection(norm(inputs)).chunk(2, dim=1)
    reached = (of_projection * nn.functional.gelu(gate)).abs().amax(dim=0)

    bounds = of_gate(norm, projection)
    assert (share * bounds <= reached).all()
    assert (reached <= SLACK * bounds).all()


@pytest.mark.parametrize("fused", [False, True])
def test_what_reads_a_norm_of_its_own_block_has_a_bound(model, fused):
    unet = build(model).unet
    if fused:
        fuse_projections(unet)
    blocks = [part for part in unet.modules() if isinstance(part, BasicTransformerBlock)]
    expected = set()
    for block in blocks:
        attention = block.attn1
        expected |= {block.ff.net[0].proj, block.ff.net[2]}
        expected |= (
            {attention.to_qkv} if fused else {attention.to_q, attention.to_k, attention.to_v}
        )

    assert set(input_bounds(unet)) == expected
    assert blocks


@pytest.mark.parametrize(
    "changes",
    [{"norm_type": "ada_norm", "num_embeds_ada_norm": 8}, {"norm_elementwise_affine": False}],
)
def test_norms_that_follow_something_else_give_none(changes):
    assert input_bounds(nn.Sequential(block_of(**changes))) == {}


def test_other_blocks_give_none(tmp_path):
    from diffusers import SD3Transformer2DModel

    write_small_sd3(tmp_path)

    assert (
        input_bounds(SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")) == {}
    )


def test_a_gate_of_another_kind_bounds_its_projection_alone():
    block = block_of(activation_fn="gelu")

    bounds = input_bounds(nn.Sequential(block))

    assert block.ff.net[2] not in bounds
    assert len(bounds) == 3


class TestFloat8:
    """The layers that round by their bound."""

    @pytest.fixture
    def block(self) -> BasicTransformerBlock:
        return block_of()

    @pytest.fixture
    def layers(self, block: BasicTransformerBlock) -> Float8Layers:
        holder = nn.Module()
        holder.transformer_blocks = nn.ModuleList([block])
        return Float8Layers(holder, smallest_side=32)

    @pytest.mark.parametrize("times", [1, 30])
    def test_results_are_as_near_as_8_bits_can_be_whatever_one_feature_might_become(
        self, block, layers, times
    ):
        # A gate with a bound of its own order, which is shut at every input.
        projection = block.ff.net[0].proj
        projection.weight[0] *= times
        projection.bias.chunk(2)[1][0] = -30.0 * times
        layers.refresh()
        inputs = torch.randn(2, 9, WIDTH)
        expected = block.ff(block.norm3(inputs))

        layers.switch(on=True)
        found = block.ff(block.norm3(inputs))

        assert not torch.equal(found, expected)
        assert (found - expected).norm() / expected.norm() < 0.06

    @pytest.mark.parametrize("dead", [1, WIDTH // 2 + 1, WIDTH])
    def test_features_that_are_always_0_leave_the_others_as_they_are(self, block, layers, dead):
        block.norm3.weight[:dead] = block.norm3.bias[:dead] = 0.0
        layers.refresh()
        inputs = torch.randn(2, 9, WIDTH)
        expected = block.ff(block.norm3(inputs))

        layers.switch(on=True)
        found = block.ff(block.norm3(inputs))

        assert (found - expected).norm() / expected.norm() < 0.06

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
    def test_a_row_is_the_same_whatever_others_there_are(self, block, layers, scale):
        layers.switch(on=True)
        row = torch.randn(1, 1, WIDTH)
        others = torch.randn(1, 9, WIDTH) * scale

        together = block.ff(block.norm3(torch.cat([row, others], dim=1)))

        torch.testing.assert_close(
            together[:, :1], block.ff(block.norm3(row)), rtol=1e-6, atol=1e-6
        )

    def test_no_input_is_cut_off(self, block, layers, monkeypatch):
        cut: list[float] = []

        def noted(numbers: torch.Tensor) -> torch.Tensor:
            cut.append(float(numbers.abs().amax()))
            return numbers.clamp(-LARGEST, LARGEST).to(E4M3)

        monkeypatch.setattr("diffusion.float8._in_8_bits", noted)
        layers.switch(on=True)
        spikes = torch.cat([torch.eye(WIDTH) * 1e4, torch.eye(WIDTH) * -1e4])

        block.ff(block.norm3(spikes[None]))

        assert len(cut) == 2
        assert max(cut) <= LARGEST

    def test_a_compiler_reads_it_whole_and_once_for_all_blocks_of_a_kind(self, block, layers):
        other = block_of()
        holder = nn.Module()
        holder.transformer_blocks = nn.ModuleList([other])
        others = Float8Layers(holder, smallest_side=32)
        for some in (layers, others):
            some.switch(on=True)
        read = []

        def noted(graph: torch.fx.GraphModule, _: object) -> object:
            read.append(graph)
            return graph.forward

        inputs = torch.randn(1, 9, WIDTH), None, torch.randn(1, 5, 32)
        expected = [one(*inputs) for one in (block, other)]
        torch._dynamo.reset()
        compiled = torch.compile(
            BasicTransformerBlock.forward, fullgraph=True, dynamic=False, backend=noted
        )

        found = [compiled(one, *inputs) for one in (block, other)]

        for one, expected_one in zip(found, expected, strict=True):
            torch.testing.assert_close(one, expected_one)
        assert len(read) == 1

    def test_a_new_version_has_bounds_of_its_own(self, block, layers):
        layers.switch(on=True)
        block.norm3.weight.mul_(1000)
        block.norm3.bias.mul_(1000)
        inputs = torch.randn(1, 9, WIDTH)

        layers.refresh()

        found = block.ff(block.norm3(inputs))
        layers.switch(on=False)
        expected = block.ff(block.norm3(inputs))
        assert (found - expected).norm() / expected.norm() < 0.06
