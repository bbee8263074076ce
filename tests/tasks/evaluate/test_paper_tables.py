"""The arithmetic of the paper's tables: what holds, and each of the 27 errata where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest

from evaclip_model.model.model_config import ModelConfig, list_models
from tasks.encoders.open_models import architecture_name
from tasks.evaluate.paper.published import TABLES, PaperRow, members_of, paper, paper_model, rows_of
from tasks.evaluate.sets.set_registry import known_sets

IMAGENETS = ("in1k", "in_a", "in_r", "in_v2", "in_sketch", "objectnet")
EXACT_MILLIONS = {
    # image tower, both towers; counted from the architectures
    "EVA-02-CLIP-B/16": (86.26, 149.69),
    "EVA-02-CLIP-L/14": (304.11, 427.76),
    "EVA-02-CLIP-L/14+": (304.43, 428.08),
    "EVA-01-CLIP-g/14": (1012.59, 1136.44),
    "EVA-01-CLIP-g/14+": (1012.59, 1366.62),
    "EVA-02-CLIP-E/14": (4350.56, 4704.59),
    "EVA-02-CLIP-E/14+": (4350.56, 5044.89),
    "Open CLIP-H/14": (632.08, 986.11),
    "Open CLIP-g/14": (1012.65, 1366.68),
    "Open CLIP-G/14": (1844.91, 2539.57),
}
Cells = Mapping[str, Any]


def cells(table: str, *, as_printed: bool = False) -> dict[str, Cells]:
    return {
        row.model: {**row.cells, **row.printed} if as_printed else row.cells
        for row in rows_of(table)
    }


def columns(table: str) -> list[str]:
    """Those that its average is made of."""
    keys = [column.key for column in paper().tables[table].columns]
    return [key for key in keys if key not in ("model", "avg", "delta")]


def mean(row: Cells, keys: list[str]) -> Decimal:
    return sum((Decimal(str(row[key])) for key in keys), Decimal()) / len(keys)


def printed(value: Decimal, digits: str = "0.1") -> Decimal:
    return value.quantize(Decimal(digits), ROUND_HALF_UP)


def wrong_averages(table: str, *, as_printed: bool) -> set[str]:
    """Rows whose average is not the mean of the columns, as far as printed digits can tell."""
    keys = columns(table)
    return {
        model
        for model, row in cells(table, as_printed=as_printed).items()
        if abs(mean(row, keys) - Decimal(str(row["avg"]))) > Decimal("0.1")
    }


def wrong_gaps(*, as_printed: bool) -> set[str]:
    return {
        model
        for model, row in cells("1b", as_printed=as_printed).items()
        if abs(row["in1k"] - row["avg"] - row["delta"]) > 0.05
    }


def disagreements(*, as_printed: bool) -> set[tuple[str, str]]:
    """(Model, column) that Tables 1b and 2 have with different values."""
    one, two = cells("1b", as_printed=as_printed), cells("2", as_printed=as_printed)
    assert one.keys() == two.keys()
    return {(m, c) for m in one for c in IMAGENETS if one[m][c] != two[m][c]}


def test_there_are_27_errata_and_every_corrected_cell_names_one_of_them() -> None:
    assert [*paper().errata] == [f"E{number}" for number in range(1, 28)]
    for table in paper().tables.values():
        for row in table.rows:
            assert row.printed.keys() <= row.errata.keys() <= row.cells.keys()
            assert all(row.cells[column] != row.printed[column] for column in row.printed)
            assert {one for ids in row.errata.values() for one in ids} <= paper().errata.keys()


def test_e1_every_gap_is_imagenet_less_the_average() -> None:
    assert wrong_gaps(as_printed=True) == {"EVA-02-CLIP-L/14"}
    assert wrong_gaps(as_printed=False) == set()


def test_e2_e3_e4_every_average_is_the_mean_of_its_columns() -> None:
    assert wrong_averages("2", as_printed=True) == {"OpenAI CLIP-L/14", "Open CLIP-L/14"}
    for table in TABLES:
        for model, row in cells(table).items():
            assert printed(mean(row, columns(table))) == Decimal(str(row["avg"])), (table, model)
    copied = {
        m for m, row in cells("2", as_printed=True).items() if row["voc2007"] == row["sun397"]
    }
    assert copied == {"OpenAI CLIP-L/14", "Open CLIP-B/16", "Open CLIP-L/14"}
    assert not any(row["voc2007"] == row["sun397"] for row in cells("2").values())


def test_the_averages_are_over_six_27_and_four_columns_which_are_the_known_sets() -> None:
    assert [len(columns(table)) for table in TABLES] == [6, 27, 4]
    for table in TABLES:
        assert set(columns(table)) == {known.column for known in members_of(table).values()}


def test_e5_hit_rates_rise_with_depth_and_are_of_the_known_sets() -> None:
    for as_printed in (False, True):
        for row in cells("4", as_printed=as_printed).values():
            for what in ("flickr30k_text", "coco_text", "flickr30k_image", "coco_image"):
                rates = [row[f"{what}_r{k}"] for k in (1, 5, 10)]
                assert rates == sorted(rates)
    retrieval = [one for one in known_sets().values() if one.metric == "retrieval"]
    named = {
        f"{one.key}_{way}_r{k}"
        for one in retrieval
        for way in ("text", "image")
        for k in (1, 5, 10)
    }
    assert named == set(columns("4"))


def test_e6_e7_tables_1b_and_2_agree_on_imagenet_and_its_variants() -> None:
    wrong = {("Open CLIP-H/14", "in_a"), ("Open CLIP-H/14", "in_v2")}
    assert disagreements(as_printed=True) == wrong
    assert disagreements(as_printed=False) == set()


def test_table_1a_has_the_imagenet_figures_of_1b_and_one_model_more() -> None:
    models, rows = cells("1a"), cells("1b")
    assert models.keys() - rows.keys() == {"EVA-01-CLIP-B/16"} and len(rows) == 15
    assert all(models[name]["in1k_zs_top1"] == row["in1k"] for name, row in rows.items())
    for table in ("2", "3", "4"):
        assert cells(table).keys() == rows.keys()


def test_e8_the_column_is_of_voc_2007() -> None:
    (column,) = (one for one in paper().tables["2"].columns if one.key == "voc2007")
    assert column.label == "VOC2007"
    assert any(note.endswith("(printed: VOC2017)") for note in paper().tables["2"].notes)


def test_e9_no_column_has_imagenet_real() -> None:
    assert not [column for column in columns("1b") if "real" in column]
    assert any(note.startswith("E9") for note in paper().tables["1b"].notes)


def test_e10_the_model_of_a_seventh_of_the_gpus_is_g_14_plus() -> None:
    gpus = {name: row["gpus"] and row["gpus"]["count"] for name, row in cells("1a").items()}
    assert round(gpus["Open CLIP-H/14"] / gpus["EVA-01-CLIP-g/14+"]) == 7
    assert round(gpus["Open CLIP-H/14"] / gpus["EVA-01-CLIP-g/14"]) == 3


def misrounded(*, as_printed: bool) -> set[tuple[str, str]]:
    """Cells of Table 1a that are not the exact counts, rounded to the digits they have."""
    return {
        (name, column)
        for name, (image, total) in EXACT_MILLIONS.items()
        for millions, column in ((image, "params_image"), (total, "params_total"))
        for cell in [cells("1a", as_printed=as_printed)[name][column]]
        # Of 149.69 million the table prints 149, of 427.76 it prints 428.
        if abs(cell - millions * 1e6) > (50e6 if cell >= 1e9 else 0.7e6)
    }


def test_e11_numbers_of_weights_are_the_exact_ones_rounded() -> None:
    wrong = {("EVA-01-CLIP-g/14+", "params_total"), ("Open CLIP-g/14", "params_total")}
    assert misrounded(as_printed=True) == wrong
    assert misrounded(as_printed=False) == set()
    for name, row in cells("7").items():
        for column in ("params_image", "params_text", "params_total"):
            assert row[column] == cells("1a")[name][column]


def test_e12_the_rounded_parts_of_two_models_add_up_to_more_than_the_exact_ones() -> None:
    more = set()
    for name, row in cells("1a").items():
        parts, total = (row["params_image"] + row["params_text"]) / 1e9, row["params_total"] / 1e9
        if total >= 1 and round(parts, 1) != round(total, 1):
            more.add(name)
    assert more == {"EVA-02-CLIP-E/14", "EVA-02-CLIP-E/14+"}


def test_e13_e14_e15_headings_and_names_are_those_of_the_other_tables() -> None:
    known = set(cells("1a"))
    for table in ("7", "8", "9", "10"):
        assert cells(table).keys() <= known
    for table in ("8", "9", "10"):
        heading = paper().tables[table].header.partition(" / ")[0]
        assert any(name.startswith(heading) for name in cells(table))
    assert cells("9", as_printed=True)["EVA-01-CLIP-g/14"]["optimizer"] == "AadamW"
    assert {row["optimizer"] for row in cells("9").values()} == {"AdamW", "LAMB"}


def test_e16_samples_of_table_8_are_those_of_1a_but_for_the_model_that_goes_on() -> None:
    other = {
        name: row["samples_seen"] - cells("1a")[name]["samples_seen"]
        for table in ("8", "9", "10")
        for name, row in cells(table).items()
        if row["samples_seen"] != cells("1a")[name]["samples_seen"]
    }
    assert other == {"EVA-02-CLIP-L/14+": -cells("1a")["EVA-02-CLIP-L/14"]["samples_seen"]}


def test_e17_the_rates_of_the_text_are_those_of_the_base_model() -> None:
    giant, base = cells("9")["EVA-01-CLIP-g/14"], cells("8")["EVA-02-CLIP-B/16"]
    assert (giant["image_peak_lr"], giant["text_peak_lr"]) == (4e-4, 4e-5)
    assert (base["image_peak_lr"], base["text_peak_lr"]) == (2e-4, 2e-5)
    assert {row["lr_schedule"] for row in cells("9").values()} == {"cosine decay"}


def test_e18_the_smallest_gap_is_that_of_l_14_plus() -> None:
    gaps = {name: row["delta"] for name, row in cells("1b").items()}
    assert min(gaps, key=lambda name: gaps[name]) == "EVA-02-CLIP-L/14+"
    assert (gaps["EVA-02-CLIP-L/14+"], gaps["EVA-02-CLIP-E/14+"]) == (0.8, 1.1)


def test_e19_e20_samples_of_the_ablation_are_not_what_the_text_says() -> None:
    first, *_, last = (row.cells for row in rows_of("5"))
    whole = cells("1a")["EVA-01-CLIP-B/16"]
    assert (last["in1k_zs_top1"], whole["in1k_zs_top1"]) == (69.7, 69.7)
    assert (last["samples_seen"], whole["samples_seen"]) == (2_500_000_000, 3_000_000_000)
    seen = [row.cells["samples_seen"] for row in rows_of("5")]
    assert min(seen[1:4]) / first["samples_seen"] == pytest.approx(5 / 13)


def test_e21_e22_minutes_and_hours_of_table_6_are_not_what_the_text_says() -> None:
    minutes = {
        (row.cells["mask_50"], row.cells["flash_attention"]): row.cells["minutes_per_40m_samples"]
        for row in rows_of("6")
    }
    saved = [1 - minutes[masked, True] / minutes[masked, False] for masked in (True, False)]
    assert [round(100 * share, 1) for share in saved] == [14.1, 42.4]
    halved = [minutes[False, flash] / minutes[True, flash] for flash in (False, True)]
    assert [round(ratio, 2) for ratio in halved] == [2.06, 1.38]
    samples_an_hour = 40e6 * 60 / minutes[True, True]
    assert round(300 * samples_an_hour / 1e9, 1) == 13.1
    assert round(cells("1a")["EVA-01-CLIP-B/16"]["samples_seen"] / samples_an_hour) == 69


def test_e23_e24_no_table_has_the_texts_g_14_nor_the_batch_of_the_checkpoint() -> None:
    giants = [row for name, row in cells("1a").items() if name.startswith("EVA-01-CLIP-g")]
    assert {row["batch_size"] for row in giants} == {"41k", "114k"}
    assert {row["gpus"]["count"] for row in giants} == {256, 112}
    assert {row["samples_seen"] for row in giants} == {11_000_000_000}
    batches = {
        name: cells("1a")[name]["batch_size"] for name in ("Open CLIP-L/14", "Open CLIP-H/14")
    }
    assert set(batches.values()) == {"79k"}


def test_e25_every_figure_of_the_row_measured_otherwise_says_so() -> None:
    for table in ("1b", "2", "4"):
        for row in rows_of(table):
            footnoted = ["E25" in row.errata.get(c, ()) for c in columns(table)]
            assert all(footnoted) if row.model == "Open CLIP-L/14" else not any(footnoted)


def test_e26_one_group_of_table_2_is_not_in_the_order_of_its_average() -> None:
    unsorted = set()
    for group in "abc":
        averages = [row.cells["avg"] for row in rows_of("2") if row.cells["group"] == group]
        if averages != sorted(averages):
            unsorted.add(group)
    assert unsorted == {"b"}


def test_e27_names_are_written_in_one_alphabet() -> None:
    for table in ("7", "8", "9", "10"):
        for row in rows_of(table):
            assert row.model.isascii()
            assert all(value.isascii() for value in row.cells.values() if isinstance(value, str))


def test_a_corrected_cell_is_footnoted_with_what_is_printed() -> None:
    row = next(row for row in rows_of("2") if row.model == "Open CLIP-B/16")
    assert (row.cells["voc2007"], row.cells["avg"]) == (78.9, 64.8)
    [voc], [average] = row.footnotes("voc2007"), row.footnotes("avg")
    assert voc.endswith("(printed: 70.8)") and average.endswith("(printed: 64.5)")
    assert not row.footnotes("in1k")


@pytest.mark.parametrize("row", rows_of("7"), ids=lambda row: row.model)
def test_a_model_of_ours_belongs_beside_the_row_with_its_architecture(row: PaperRow) -> None:
    [name] = [
        shipped
        for shipped in list_models()
        if (beside := paper_model("", architecture_name(ModelConfig.load(shipped))))
        and beside.row == row.model
    ]
    config = ModelConfig.load(name)
    for ours, tower in ((config.vision, "image"), (config.text, "text")):
        printed_tower = row.cells[tower]
        assert (ours.layers, ours.width, ours.heads) == tuple(
            printed_tower[key] for key in ("layers", "width", "heads")
        )
