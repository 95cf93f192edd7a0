# SPDX-License-Identifier: Apache-2.0
"""The demo: its pair representation, its triangle block, and the whole command on a small crop.

Inputs: ``examples/`` and the coordinates in ``examples/data``. Must not import private modules of
the package: the demo is a user.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

import blocks  # noqa: E402
import demo  # noqa: E402
import protein  # noqa: E402
import recipes  # noqa: E402
import triangle  # noqa: E402

COORDINATES = EXAMPLES / "data" / "1tii_ca.csv"


@pytest.fixture(scope="module")
def toxin() -> protein.Complex:
    return protein.read_complex(COORDINATES)


def test_complex_has_seven_chains_in_file_order(toxin):
    assert len(toxin) == 712
    spans = toxin.chain_spans()
    assert [(chain, end - first) for chain, first, end in spans] == [
        *((name, 98) for name in "DEFGH"),
        ("A", 186),
        ("C", 36),
    ]
    assert spans[0][1] == 0 and spans[-1][2] == 712
    # Consecutive C-alpha atoms of a chain are 3.8 angstrom apart (3.0 for a cis peptide bond):
    # wrong columns would show here.
    follows = (toxin.numbers[1:] - toxin.numbers[:-1] == 1) & torch.tensor(
        [a == b for a, b in zip(toxin.chains, toxin.chains[1:])]
    )
    steps = (toxin.coordinates[1:] - toxin.coordinates[:-1]).norm(dim=1)[follows]
    assert len(steps) == 712 - 7 - 1
    assert 2.7 < steps.min() and steps.max() < 4.1


def test_crop_takes_the_first_residues_across_chains(toxin):
    crop = toxin.crop(256)
    assert [span[0] for span in crop.chain_spans()] == ["D", "E", "F"]
    assert torch.equal(crop.coordinates, toxin.coordinates[:256])
    assert len(toxin.crop(0)) == len(toxin.crop(5000)) == 712
    with pytest.raises(ValueError, match="crop must be 0 .* got -1"):
        toxin.crop(-1)


def test_displaced_moves_atoms_by_sigma(toxin):
    moved = toxin.displaced(0.5, seed=3)
    delta = moved.coordinates - toxin.coordinates
    assert 0.45 < delta.std() < 0.55
    assert torch.equal(moved.coordinates, toxin.displaced(0.5, seed=3).coordinates)
    assert not torch.equal(moved.coordinates, toxin.displaced(0.5, seed=4).coordinates)
    assert moved.chains == toxin.chains


def test_pair_features(toxin):
    features = protein.pair_features(toxin)
    chains = toxin.chains
    assert torch.equal(features.distance, features.distance.T)
    assert torch.equal(features.distance_bin, features.distance_bin.T)
    assert torch.equal(features.same_chain, features.same_chain.T)
    assert (features.distance.diagonal() == 0).all()
    assert (features.distance_bin.diagonal() == 0).all()
    assert features.same_chain.sum() == 5 * 98**2 + 186**2 + 36**2

    # Relative position is antisymmetric about its middle bin, and only within a chain.
    same = features.same_chain
    assert (features.position[~same] == protein.OTHER_CHAIN).all()
    total = features.position + features.position.T
    assert (total[same] == 2 * protein.MAX_OFFSET).all()
    assert features.position[same].min() == 0
    assert features.position[same].max() == 2 * protein.MAX_OFFSET
    # The residue numbers count, not the row numbers: A47 is not resolved, so A48 is two after A46.
    first = chains.index("A")
    before = first + 45
    assert toxin.numbers[before] == 46 and toxin.numbers[before + 1] == 48
    assert features.position[before + 1, before] == protein.MAX_OFFSET + 2

    # One bin by hand: 3.25 + 1.25 n are the edges.
    i, j = 3, 150
    expected = int((features.distance[i, j] - 3.25) // 1.25) + 1
    assert features.distance_bin[i, j] == min(expected, 39)
    assert features.distance_bin.max() == protein.NUM_DISTANCE_BINS - 1


def test_pair_representation_is_seeded_and_of_order_one(toxin):
    crop = toxin.crop(120)
    z = protein.pair_representation(crop, channels=128, seed=5)
    assert z.shape == (1, 120, 120, 128) and z.dtype == torch.float32 and z.is_contiguous()
    assert torch.equal(z, protein.pair_representation(crop, channels=128, seed=5))
    assert not torch.equal(z, protein.pair_representation(crop, channels=128, seed=6))
    assert 0.8 < z.std() < 1.25
    per_pair = z.var(dim=-1, unbiased=False)
    assert per_pair.min() > 0.3 and per_pair.max() < 3.0


def test_directions_are_unit_vectors_in_the_frame_of_residue_i(toxin):
    features = protein.pair_features(toxin)
    length = features.direction.norm(dim=-1)
    off_diagonal = ~torch.eye(712, dtype=torch.bool)
    torch.testing.assert_close(length[off_diagonal], torch.ones(712 * 711, dtype=torch.float64))
    assert (length.diagonal() == 0).all()
    # In its own frame, inside a chain, a residue sees the next one along the first axis, and the
    # one before in the plane of the first two.
    inside = torch.arange(1, 97)
    ahead = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(96, 3)
    torch.testing.assert_close(features.direction[inside, inside + 1], ahead)
    behind = features.direction[inside, inside - 1]
    assert behind[:, 2].abs().max() < 1e-12 and (behind[:, 1] > 0).all()
    # Moving and turning the whole complex changes nothing of what is known about pairs.
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turn *= torch.linalg.det(turn)
    moved = protein.Complex(toxin.chains, toxin.numbers, toxin.coordinates @ turn.T + 7)
    torch.testing.assert_close(protein.pair_features(moved).direction, features.direction)
    # A crop that leaves two residues of a chain has no frame for these, and no other effect.
    cropped = protein.pair_features(toxin.crop(100)).direction
    assert (cropped[98:] == 0).all()
    assert torch.equal(cropped[:98], features.direction[:98, :100])


def test_pair_representation_is_a_projection_of_the_features(toxin):
    """Against the long way: one-hot vectors times matrices, in the order of the formula."""
    crop = toxin.crop(110)
    size, channels = len(crop), 16
    features = protein.pair_features(crop)
    indices = (
        (66, features.position),
        (2, features.same_chain.long()),
        (40, features.distance_bin),
    )
    generator = torch.Generator().manual_seed(1)
    expected = features.direction @ torch.randn(3, channels, generator=generator).double()
    for bins, index in indices:
        matrix = torch.randn(bins, channels, generator=generator).double()
        expected += torch.nn.functional.one_hot(index, bins).double() @ matrix
    z = protein.pair_representation(crop, channels=channels, seed=1)
    assert z.shape == (1, size, size, channels)
    torch.testing.assert_close(z[0].double(), expected / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("# source\nchain,residue,x,y,z\nA,GLY,1,2,3\n", "residue_number.* are missing"),
        ("# source\nchain,residue_number,residue,x,y,z\n", "no residues"),
        ("chain,residue_number,residue,x,y,z\nA,1,GLY,1,nan,3\n", "residue 0 are not finite"),
    ],
)
def test_bad_coordinate_files_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        protein.read_complex(path)


def triangle_by_einsum(block, z, mask):
    """Algorithms 11 and 12 written out in FP64, from the block's weights."""
    weights = {name: value.double() for name, value in block.state_dict().items()}

    def linear(x, name):
        product = torch.einsum("bijc,dc->bijd", x, weights[f"{name}.weight"])
        return product + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = norm(z.double(), "layer_norm_in")
    a = mask.double()[..., None] * torch.sigmoid(linear(x, "linear_a_g")) * linear(x, "linear_a_p")
    b = mask.double()[..., None] * torch.sigmoid(linear(x, "linear_b_g")) * linear(x, "linear_b_p")
    equation = "bikd,bjkd->bijd" if block.direction == "outgoing" else "bkid,bkjd->bijd"
    product = torch.einsum(equation, a, b)
    gate = torch.sigmoid(linear(x, "linear_g"))
    return gate * linear(norm(product, "layer_norm_out"), "linear_z")


@pytest.mark.parametrize("direction", triangle.DIRECTIONS)
def test_triangle_block_against_einsum(direction):
    generator = torch.Generator().manual_seed(11)
    block = triangle.TriangleMultiplication(direction, channels=12, hidden=7, seed=2)
    for parameter in block.parameters():  # Biases and norms too, so that a forgotten one shows.
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + 0.2)
    z = torch.randn(2, 9, 9, 12, generator=generator)
    mask = (torch.rand(2, 9, 9, generator=generator) > 0.3).float()
    expected = triangle_by_einsum(block, z, mask)
    got = block(z, mask)
    assert got.shape == z.shape and got.dtype == z.dtype
    assert expected.abs().mean() > 0.05
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)
    # The mask counts, and not transposed.
    for wrong in (torch.ones_like(mask), mask.mT):
        assert (block(z, wrong).double() - expected).abs().max() > 0.05


def test_triangle_block_is_seeded_and_not_zero():
    z, mask = torch.randn(1, 6, 6, 8), torch.ones(1, 6, 6)
    make = lambda seed: triangle.TriangleMultiplication("incoming", 8, 4, seed)(
        z, mask
    )  # noqa: E731
    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))
    assert make(1).abs().mean() > 0.05
    with pytest.raises(ValueError, match="direction must be one of .* got 'sideways'"):
        triangle.TriangleMultiplication("sideways")


def test_triangle_contraction_can_be_exchanged():
    block = triangle.TriangleMultiplication("outgoing", 8, 4)
    z, mask = torch.randn(1, 6, 6, 8), torch.ones(1, 6, 6)
    seen = []

    def negated(a, b, direction):
        seen.append((a.shape, direction))
        return -triangle.contract(a, b, direction)

    assert not torch.allclose(block(z, mask, negated), block(z, mask))
    assert seen == [((1, 4, 6, 6), "outgoing")]


BLOCK_NAMES = [
    "torch, FP32",
    "FP32",
    "Float8 delayed",
    "Float8 current",
    "Float8 bound",
    "MXFP8",
]
RECIPE_NAMES = ["BF16", "Float8 delayed", "Float8 current", "MXFP8"]


def run_demo(folder, *options):
    """Exit status, what it printed is left to capsys, and its numbers."""
    status = demo.main(["--device", "cpu", "--out", str(folder), *options])
    return status, json.loads((folder / "triangle_1tii.json").read_text())


def test_demo_end_to_end(tmp_path, capsys):
    status, content = run_demo(tmp_path / "new" / "folder", "--crop", "48")
    printed = capsys.readouterr().out
    assert status == 0
    assert list(content["directions"]) == ["outgoing", "incoming"]
    for direction, rows in content["directions"].items():
        assert [row["name"] for row in rows] == ["FP32", *RECIPE_NAMES]
        for row in rows:
            values = row["channel_sqnr_db"]
            assert len(values) == 128
            assert row["worst_db"] == min(values) == values[row["worst_channel"]]
            assert min(values) <= row["sqnr_db"] <= max(values)
            if row["name"] == "FP32":
                assert row["engine"] == "torch" and row["worst_db"] > 120
            elif row["name"] == "BF16":
                assert row["engine"] == "reference"
                assert row["sqnr_db"] >= 45 and row["worst_db"] >= 45 and row["output_db"] >= 45
            else:
                assert row["engine"] == "emulated"
                assert row["sqnr_db"] >= 27 and row["worst_db"] >= 26 and row["output_db"] >= 27
                # Three bits of mantissa cannot do better: FP8 that is BF16 in secret shows here.
                assert row["worst_db"] < 40
            # Emulated recipes have no times, and nor has anything else on a CPU.
            assert row["product_ms"] is None and row["with_quantization_ms"] is None
            assert f"{row['name']} " in printed and f"{row['sqnr_db']:.1f}" in printed
            assert f"{row['worst_db']:.1f}" in printed and f"{row['output_db']:.1f}" in printed
    assert list(content["blocks"]) == ["outgoing", "incoming"]
    for direction, block in content["blocks"].items():
        assert block["size"] == 48
        assert [row["name"] for row in block["rows"]] == BLOCK_NAMES
        for row in block["rows"]:
            decibels = [row["output_db"], row["gradient_z_db"], row["gradient_weights_db"]]
            assert all(f"{db:.1f}" in printed for db in decibels)
            if row["name"] in ("torch, FP32", "FP32"):
                assert min(decibels) > 100 and row["engine"] != "emulated"
            else:
                assert row["engine"] == "emulated"
                assert row["output_db"] >= 27 and min(decibels) >= 20 and max(decibels[1:]) < 40
            assert row["forward_ms"] is None and row["step_ms"] is None and row["peak_mib"] is None
    assert "48 of 712 residues" in printed and "emulated" in printed and " ms" not in printed
    assert "MXFP8 64" in printed  # 48 is no multiple of 32

    image = (tmp_path / "new" / "folder" / "triangle_1tii.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n") and len(image) > 50_000


def test_demo_counts_the_bytes_of_codes_and_scales(tmp_path):
    _, content = run_demo(tmp_path, "--crop", "64", "--hidden", "32")
    elements = 2 * 32 * 64 * 64
    # 32 * 64 rows and two blocks of 32 columns: scales of one byte, columns padded to 4.
    row_wise_scales = 2 * (32 * 64) * 4
    # 64 blocks of 32 rows, and 64 columns padded to 128.
    column_wise_scales = 2 * (32 * 64 // 32) * 128
    expected = {
        "outgoing": {
            "FP32": 4 * elements,
            "BF16": 2 * elements,
            "Float8 delayed": elements + 2 * 4,
            "Float8 current": elements + 2 * 4,
            "MXFP8": elements + row_wise_scales,
        },
        "incoming": {
            "FP32": 4 * elements,
            "BF16": 2 * elements,
            "Float8 delayed": 2 * elements + 2 * 4,
            "Float8 current": 2 * elements + 2 * 4,
            "MXFP8": elements + column_wise_scales,
        },
    }
    for direction, rows in content["directions"].items():
        assert {row["name"]: row["operand_bytes"] for row in rows} == expected[direction]


def test_demo_is_repeatable_and_seeded(tmp_path):
    options = ("--crop", "32", "--hidden", "32")
    first = run_demo(tmp_path / "1", *options, "--seed", "3")[1]
    again = run_demo(tmp_path / "2", *options, "--seed", "3")[1]
    other = run_demo(tmp_path / "3", *options, "--seed", "4")[1]
    for key in ("directions", "blocks"):
        assert first[key] == again[key]
        assert first[key] != other[key]


def damaged_product(damage):
    """`recipes.multiply` with a planted bug in what it returns."""

    def multiply(a, b, direction, size):
        return damage(recipes.multiply(a, b, direction, size))

    return multiply


def zero_one_channel(product):
    product = product.clone()
    product[5] = 0
    return product


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda product: 2 * product, id="scale-twice"),
        pytest.param(lambda product: 1.06 * product, id="scale-6-percent"),
        pytest.param(lambda product: product.roll(1, dims=0), id="channels-swapped"),
        pytest.param(lambda product: product.mT, id="transposed"),
        pytest.param(zero_one_channel, id="one-channel-of-32-zero"),
    ],
)
def test_demo_fails_when_the_product_is_wrong(tmp_path, capsys, monkeypatch, damage):
    monkeypatch.setattr(demo, "multiply", damaged_product(damage))
    status, _ = run_demo(tmp_path, "--crop", "32", "--hidden", "32")
    assert status == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Below the accuracy its format must have" in printed
    for name in RECIPE_NAMES:
        assert f"outgoing {name}" in printed and f"incoming {name}" in printed


@pytest.mark.parametrize("name, factor", (("g_in_weight", 0.0), ("p_out_weight", 1.1)))
def test_demo_fails_when_the_block_is_wrong(tmp_path, capsys, monkeypatch, name, factor):
    """Gates that are stuck, and an output that is a tenth too large."""
    load = blocks.te.TriangleMultiplication.from_openfold

    def load_damaged(*arguments, **options):
        block = load(*arguments, **options)
        with torch.no_grad():
            getattr(block, name).mul_(factor)
        return block

    monkeypatch.setattr(blocks.te.TriangleMultiplication, "from_openfold", load_damaged)
    status, _ = run_demo(tmp_path, "--crop", "32", "--hidden", "32")
    assert status == 1
    printed = " ".join(capsys.readouterr().out.split())
    for row in BLOCK_NAMES[1:]:
        assert f"incoming block {row}" in printed
    assert "block torch" not in printed.partition("Below the accuracy")[2]


def test_delayed_scaling_uses_the_amax_of_the_step_before(emulated):
    earlier, now = torch.randn(4, 32, 32), torch.randn(4, 32, 32)
    earlier[1, 2, 3], now[0, 0, 0] = -7.0, 14.0
    quantizer = recipes.delayed_scaling_quantizer(earlier, columnwise=False)
    assert quantizer.scale.item() == 448 / 7
    quantized = recipes.teb.quantize(now, quantizer)
    assert quantizer.scale.item() == 448 / 7 and quantizer.amax.item() == 14
    # Twice the amax of the history saturates: 448 / scale is all that fits.
    assert quantized.dequantize()[0, 0, 0].item() == pytest.approx(7.0)


@pytest.mark.parametrize("crop", ["-1", "many"])
def test_demo_refuses_a_bad_crop(capsys, crop):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--crop", crop])
    assert stopped.value.code == 2
    assert "--crop" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_demo_on_a_gpu_times_what_is_not_emulated(tmp_path, capsys):
    assert demo.main(["--device", "cuda", "--out", str(tmp_path), "--crop", "200"]) == 0
    assert "+quant" in capsys.readouterr().out
    content = json.loads((tmp_path / "triangle_1tii.json").read_text())
    for block in content["blocks"].values():
        assert block["size"] == 200
        for row in block["rows"]:
            assert (row["engine"] == "emulated") == (row["step_ms"] is None)
            if row["name"] in ("BF16", "Float8 delayed", "Float8 current", "Float8 bound"):
                assert row["engine"] == "fused" and row["peak_mib"] > 0
    for rows in content["directions"].values():
        for row in rows:
            is_timed = row["product_ms"] is not None and row["with_quantization_ms"] is not None
            assert is_timed == (row["engine"] != "emulated")
            if row["name"] == "BF16":
                assert row["engine"] == "cublaslt"
