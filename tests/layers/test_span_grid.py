"""SeNER's span grid: the band, its transpose, the plus-shaped field, padding, and the banded biaffine scores."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError, UnsupportedError
from regard.layers import create
from regard.layers.band import BandedBiaffine, from_band, to_band, transpose_band
from regard.layers.span_grid import SpanGridAttention
from regard.patterns import full

EXACT = {"rtol": 0.0, "atol": 1e-12}


def make(reach: int = 1, **settings: object) -> SpanGridAttention:
    torch.manual_seed(0)
    layer = create("sener", dim=8, heads=2, reach=reach, **settings).double()
    assert isinstance(layer, SpanGridAttention)
    return layer


def cells(n: int, reach: int) -> torch.Tensor:
    return torch.randn(2, n * (2 * reach + 1), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("n", "reach"), [(1, 0), (5, 1), (6, 2), (3, 4)])
def test_bands(n: int, reach: int) -> None:
    grid = torch.randn(2, n, n, 3)
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= reach
    band = to_band(grid, reach)
    assert band.shape == (2, n, 2 * reach + 1, 3)
    assert torch.equal(from_band(band, reach), grid * near[..., None])
    assert torch.equal(from_band(transpose_band(band, reach), reach), (grid * near[..., None]).transpose(1, 2))
    assert torch.equal(transpose_band(transpose_band(band, reach), reach), band)


def seen(layer: SpanGridAttention, n: int, part: int, i: int, j: int) -> set[tuple[int, int]]:
    """The cells that cell (i, j) attends to: along its row (part 0) or its column (1)."""
    x = cells(n, layer.reach)
    band = (x.unflatten(1, (n, -1)) * layer.valid(x, None)[..., None]).requires_grad_()
    out = layer.plus(band, layer.valid(x, None))[part][:, i, j - i + layer.reach].sum()
    (grad,) = torch.autograd.grad(out, band)
    rows, places = grad[0].abs().amax(-1).nonzero().T.tolist()
    return {(a, a + t - layer.reach) for a, t in zip(rows, places, strict=True)}


def test_worked_plus() -> None:
    assert seen(make(), 5, 0, 2, 3) == {(2, 1), (2, 2), (2, 3)}
    assert seen(make(), 5, 1, 2, 3) == {(2, 3), (3, 3), (4, 3)}
    assert seen(make(), 5, 1, 0, 0) == {(0, 0), (1, 0)}


def test_the_quirk_of_the_public_code() -> None:
    layer, quirky = make(), make(swapped=True)
    assert seen(quirky, 5, 1, 2, 3) == seen(layer, 5, 1, 3, 2) == {(1, 2), (2, 2), (3, 2)}


def test_columns_are_rows_of_the_transpose() -> None:
    layer, n = make(2), 6
    x = cells(n, 2)
    valid = layer.valid(x, None)
    band = x.unflatten(1, (n, -1)) * valid[..., None]
    mirrored = layer.along_column(transpose_band(band, 2), valid)
    got = from_band(layer.plus(band, valid)[1], 2)
    torch.testing.assert_close(got, from_band(mirrored, 2).transpose(1, 2), **EXACT)


def test_cells_that_do_not_exist() -> None:
    layer, n = make(2), 5
    x = cells(n, 2)
    missing = ~layer.valid(x, None).flatten(1)
    out = layer(x).out
    assert (out[missing] == 0).all() and torch.equal(layer(x.masked_fill(missing[..., None], 1e6)).out, out)


def test_the_whole_layer_is_what_its_definition_says() -> None:
    """Cell by cell: the side it is on, attention along its row and its column, and the convolutions of the band."""
    layer, n, reach = make(2), 5, 2
    torch.nn.init.normal_(layer.side)
    x = cells(n, reach)
    there = [(i, j) for i in range(n) for j in range(max(0, i - reach), min(n, i + reach + 1))]
    cell = {(i, j): x[0, i * 5 + j - i + reach] + layer.side[int(j >= i)] for i, j in there}

    def turned(y: torch.Tensor, place: int) -> torch.Tensor:
        angle = place * 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)  # of a head's 4 channels, in halves
        a, b = y[:2], y[2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def along(axial: torch.nn.Module, at: tuple[int, int], others: list[tuple[int, int]], axis: int) -> torch.Tensor:
        heads = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            q = turned(axial.q_proj(cell[at])[part], at[axis])
            keys = torch.stack([turned(axial.k_proj(cell[o])[part], o[axis]) for o in others])
            values = torch.stack([axial.v_proj(cell[o])[part] for o in others])
            heads.append((keys @ q / 2).softmax(0) @ values)
        return torch.cat(heads)

    band = torch.zeros(n, 5, 8, dtype=torch.float64)
    for i, j in there:
        row = along(layer.along_row, (i, j), [c for c in there if c[0] == i], 1)
        column = along(layer.along_column, (i, j), [c for c in there if c[1] == j], 0)
        band[i, j - i + reach] = layer.attended(cell[i, j] + layer.join(torch.cat([row, column])))
    real = torch.zeros(n, 5, 1, dtype=torch.float64)
    for i, j in there:
        real[i, j - i + reach] = 1
    image = torch.nn.functional.gelu(layer.first(band.movedim(-1, 0)[None]))[0].movedim(0, -1) * real
    want = layer.convolved(band + layer.second(image.movedim(-1, 0)[None])[0].movedim(0, -1)) * real
    torch.testing.assert_close(layer(x).out[0], want.flatten(0, 1), rtol=0, atol=1e-10)


def test_padding_on_both_sides() -> None:
    layer = make(1)
    x = cells(6, 1)
    real = torch.zeros(2, 6, 3, dtype=torch.bool)
    real[:, 1:5] = True
    out = layer(x, key_padding=real.flatten(1)).out.unflatten(1, (6, 3))
    alone = layer(x.unflatten(1, (6, 3))[:, 1:5].flatten(1, 2)).out.unflatten(1, (4, 3))
    torch.testing.assert_close(out[:, 1:5], alone, **EXACT)


def test_biaffine_is_the_dense_one_within_the_band() -> None:
    torch.manual_seed(0)
    scorer = BandedBiaffine(6, 4, reach=2, hidden=5).double()
    words = torch.randn(2, 7, 6, dtype=torch.float64)
    gelu, one = torch.nn.functional.gelu, torch.ones(2, 7, 1, dtype=torch.float64)
    s, e = (torch.cat([gelu(p(words)), one], -1) for p in (scorer.start, scorer.end))
    dense = torch.stack(
        [
            torch.stack(
                [
                    torch.einsum("bs,cse,be->bc", s[:, i], scorer.bilinear, e[:, j])
                    + scorer.linear(torch.cat([s[:, i], e[:, j]], -1))
                    for j in range(7)
                ],
                1,
            )
            for i in range(7)
        ],
        1,
    )
    torch.testing.assert_close(scorer(words), to_band(dense, 2), **EXACT)
    assert 5120**2 / (5120 * 257) == pytest.approx(20, rel=0.01)


def test_dropout_only_while_training() -> None:
    layer, x = make(dropout=0.5), cells(4, 1)
    assert not torch.equal(layer(x).out, layer(x).out)
    layer.eval()
    assert torch.equal(layer(x).out, layer(x).out)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("reach", lambda: make(-1)),
        ("heads", lambda: SpanGridAttention(8, 8)),
        ("dropout", lambda: make(dropout=1.0)),
        ("dropout", lambda: make(dropout="half")),
        ("swapped", lambda: make(swapped=None)),
        ("x", lambda: make(1)(cells(4, 1)[:, :-1])),
        ("key_padding", lambda: make(1)(cells(4, 1), key_padding=torch.arange(12).expand(2, 12) > 0)),
        ("key_padding", lambda: make(1)(cells(3, 1), key_padding=(torch.arange(9) // 3 != 1).expand(2, 9))),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()


def test_it_has_a_pattern_of_its_own() -> None:
    with pytest.raises(UnsupportedError, match="sener takes no pattern"):
        make()(cells(3, 1), pattern=full())
