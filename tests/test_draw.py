"""Drawings hold what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from llava.visualize import PatchMap, Shares, Stay, TopTokens, draw

PICTURE = Image.new("RGB", (40, 20), (10, 200, 10))
# Eight patches of ten pixels, and one row that shows nothing.
BOXES = np.array([[x, y, x + 10, y + 10] for y in (0, 10) for x in (0, 10, 20, 30)] + [[np.nan] * 4], dtype=float)
PATCHES = PatchMap((40, 20), BOXES, np.array(["whole"] * 8 + [""]))


def test_every_panel_shows_its_scores_over_the_picture():
    scores = np.arange(27, dtype=float).reshape(3, 9)
    scores[0, 3] = np.nan
    figure = draw.draw_on_picture(PICTURE, PATCHES, scores, ["a", "b", "c"], "title", "attention", columns=2)
    panels = [axes for axes in figure.axes if len(axes.images) == 2]
    assert [axes.get_title().split()[0] for axes in panels] == ["a", "b", "c"]
    for axes, row in zip(panels, np.nan_to_num(scores), strict=True):
        heat = np.asarray(axes.images[1].get_array())
        np.testing.assert_array_equal(heat[::10, ::10], row[:8].reshape(2, 4))
        assert axes.images[1].get_clim() == (0, row[:8].max())
        assert f"max {row[:8].max():.2g}" in axes.get_title()
    figure.canvas.draw()


def test_kept_patches_stay_bright_and_the_rest_pales():
    kept = np.zeros(9, dtype=bool)
    kept[[5, 8]] = True
    result = draw.overlay_kept(PICTURE, PATCHES, kept)
    scale = result.width / 40
    assert result.getpixel((round(15 * scale), round(15 * scale))) == (10, 200, 10)
    assert min(result.getpixel((round(5 * scale), round(5 * scale)))) > 150
    outline = result.getpixel((round(10 * scale), round(15 * scale)))
    assert "#{:02x}{:02x}{:02x}".format(*outline).upper() == draw.ORANGE


def test_a_patch_is_the_paler_the_sooner_it_left_and_merged_ones_share_a_frame():
    alone = np.array([1, 0.5, 0, 0, 0, 0, 0.5, 0, 0])
    merged = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0])
    stay = Stay(alone, merged, alone == 1, [np.array([2, 3, 7])], 1)
    result = draw.overlay_stay(PICTURE, PATCHES, stay)
    scale = result.width / 40

    def at(x, y):
        return result.getpixel((round(x * scale), round(y * scale)))

    def name(colour):
        return "#{:02x}{:02x}{:02x}".format(*colour).upper()

    assert at(5, 5) == (10, 200, 10) and name(at(0, 5)) == draw.ORANGE
    assert at(5, 5)[0] < at(15, 5)[0] < at(5, 15)[0]
    assert at(15, 5) == at(25, 15)
    assert at(25, 5) == at(35, 5) == at(35, 15) != at(25, 15)
    # Around the three together, and not between them.
    assert name(at(20.1, 5)) == name(at(39.9, 15)) == draw.GROUPS[0]
    assert at(30, 5) == at(35, 10) == at(25, 5)
    figure = draw.draw_stays(PICTURE, PATCHES, {"$one$\nanswer": stay, "two": stay}, "title")
    assert [axes.get_title() for axes in figure.axes] == ["answer, 1 of no patch", "1 of no patch"]
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["$one$", "two"]
    figure.canvas.draw()


def test_tables_show_texts_and_leave_out_what_is_not_there():
    top = TopTokens(
        np.array([[1, 2], [3, 4]]),
        np.array([[0.9, 0.1], [np.nan, np.nan]], dtype=np.float32),
        np.array([["$x_1$", "a very long token"], ["", ""]], dtype=object),
    )
    figure = draw.draw_top_tokens(top, "title")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["$x_1$  0.90", "a very long…  0.10"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["input", "layer 0"]
    figure.canvas.draw()  # dollar signs are no formula


def test_bars_add_up():
    shares = Shares(*np.array([[0.2, 0.3], [0.5, 0.1], [0.3, 0.4], [0.0, 0.2]]))
    figure = draw.draw_shares(shares, "title", select_layer=1)
    tops = {}
    for bar in figure.axes[0].patches:
        tops[round(bar.get_x(), 3)] = max(tops.get(round(bar.get_x(), 3), 0), bar.get_y() + bar.get_height())
    assert list(tops.values()) == pytest.approx([1, 1])
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["selection: layer 1", "prefix", "image", "text behind it", "lost in the shallow stage"]
    rows = draw.draw_rows_per_layer([10, 10, 4], 7, "title").axes[0].patches
    assert [bar.get_height() for bar in rows] == [3, 3, 3, 7, 7, 1]


def test_curves_and_savings_and_sinks_draw():
    curve = np.array([np.nan, 0.99, 0.98])
    axes = draw.draw_cosine_curve({"run": curve}, "t", {"layer_threshold": 0.995}, 2, None).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), curve)
    assert axes.lines[1].get_ydata()[0] == 0.995
    figure = draw.draw_savings({"a": {"paper": 0.5, "executed": 0.25}, "b": {"paper": 0.1, "executed": 0}}, "t")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.5, 0.25, 0.1, 0]
    norms, attention = np.array([[1.0, 2, 3], [np.nan] * 3]), np.array([[0.1, 0.7, 0.2], [0, 0, 0]])
    most = draw.draw_norms_per_layer(norms, attention, "t").axes[0].lines[-1]
    assert most.get_ydata().tolist() == [2.0]
    points = draw.draw_sinks(norms[0], attention[0], 0, "t").axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(points, [[0.1, 1], [0.7, 2], [0.2, 3]])
    lines = draw.draw_token_probabilities(np.array([[0.1, 0.9], [0.6, 0.4]]), ["a", "b"], "t").axes[0].lines
    assert lines[1].get_ydata().tolist() == [0.9, 0.4] and lines[0].get_xdata().tolist() == [-1, 0]
