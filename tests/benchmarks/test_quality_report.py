"""QUALITY.md's tables, verdicts and figures, from made-up records."""

import json
from dataclasses import asdict

import pytest

from benchmarks.quality.experiment import Effect
from benchmarks.report import markdown, quality
from benchmarks.report.quality import BELOW, CLAIMS, CONFIRMED, MISSING, REFUTED, SMALLER, Claim

RUN = {"device": "A CPU", "cpu_capability": "avx2", "torch": "2.13.0", "started": "2026-11-30T10:00:00+00:00"}


def effect(low, high, method="simple", over="plain", metric="NDCG@10", workload="sasrec"):
    return Effect(
        effect_of=method, over=over, op="op", workload=workload, metric=metric, seeds=20, users=943, data="MovieLens",
        baseline=0.08, effect=(low + high) / 2, low=low, high=high, detectable=0.0063,
    )  # fmt: skip


def training(arm, seed, ndcg, **learned):
    dropout, source = (0.5, "logits") if arm == "plain" else (0.2, "weights")
    shape = {"dropout": dropout, "length": 50, "source": source}
    return {
        "workload": "sasrec", "arm": arm, "seed": seed, "shape": shape,
        "parameters": 1000, "test": {"NDCG@10": ndcg}, "learned": learned,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    curves = [
        {"block 0, raw": [0.25 + more, 0.75 + more], "block 0, used": [0.5 + more, 0.5 + more]} for more in (0, 0.25)
    ]
    rows = [training("plain", seed, 0.08 + seed / 100, **{"block 0, raw": [0.5, 0.5]}) for seed in range(2)]
    rows += [training("simple", seed, 0.09, **own) for seed, own in enumerate(curves)]
    for arm in ("plain", "simple"):  # only the dropout is searched for
        tuned = [training(arm, 1000, 0.5), training(arm, 1000, 0.4)]
        tuned[0]["shape"] = {**tuned[0]["shape"], "dropout": 0.9}
        rows += [{**row, "workload": "sasrec tuning"} for row in tuned]
    rows += [asdict(effect(0.001, 0.003)), asdict(effect(-0.002, 0.004, metric="HR@10"))]
    older = [asdict(effect(-0.003, -0.001))]
    for name, own in (("20261130-100000-sasrec-cpu", rows), ("20261129-100000-sasrec-cpu", older)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**row, **RUN}) + "\n" for row in own))
    return tmp_path


@pytest.mark.parametrize(
    ("low", "high", "size", "expected"),
    [
        (0.001, 0.003, None, CONFIRMED),
        (-0.003, -0.001, None, REFUTED),
        (-0.001, 0.003, None, BELOW),
        (0.001, 0.005, 0.0036, CONFIRMED),  # the claimed size is inside
        (0.001, 0.003, 0.0036, SMALLER),
        (-0.001, 0.003, 0.0036, REFUTED),  # no gain as large as claimed
        (-0.001, 0.005, 0.0036, BELOW),
    ],
)
def test_verdicts(low, high, size, expected):
    assert quality.verdict(effect(low, high), size) == expected
    assert quality.verdict(None, size) == MISSING


def test_the_newest_record_counts(folder):
    finished = quality.read(folder, "sasrec")
    assert finished.path.name.startswith("20261130")
    assert finished.effect("simple", "plain", "NDCG@10").low == 0.001
    assert finished.effect("value", "plain", "NDCG@10") is None
    assert {(row["arm"], row["seed"]) for row in finished.trainings} == {
        (a, s) for a in ("plain", "simple") for s in (0, 1)
    }
    assert quality.read(folder, "sasrec_recbole") is None and quality.read(folder, "din") is None


def test_a_page(folder):
    finished = quality.finished_experiments(folder)
    assert set(finished) == {"sasrec"}
    page = "# Head\n<!-- plot: claims -->\nold\n<!-- plot: end -->\nprose\n<!-- plot: sasrec -->\n<!-- plot: end -->\n"
    page += "<!-- plot: din -->\n<!-- plot: end -->\n<!-- plot: serving -->\n<!-- plot: end -->\n"
    every = quality.blocks(finished, folder, {"sasrec": ("figures/lags.svg", "Weights by lag.")})
    blocks = {name: every[name] for name in ("claims", "sasrec", "din", "serving")}
    written = markdown.with_blocks(page, blocks)
    assert markdown.with_blocks(written, blocks) == written
    assert "old" not in written and written.startswith("# Head\n") and "\nprose\n" in written
    row = "| AWRSR | refinement improves SASRec | simple over plain | NDCG@10 | +0.0020 [+0.0010, +0.0030] | 20 × 943 "
    assert f"{row}| 0.0063 | confirmed |" in written
    assert "| value over plain | NDCG@10 | – | – | – | not measured |" in written
    assert "| plain | dropout 0.5 | 0.0850 ± 0.0071 | 1,000 |" in written  # only what it searched for
    assert "| effect [95% interval] | NDCG@10 | HR@10 |" in written
    assert "| simple over plain | +0.0020 [+0.0010, +0.0030] | +0.0010 [-0.0020, +0.0040] |" in written
    assert "[20261130-100000-sasrec-cpu](results/20261130-100000-sasrec-cpu.jsonl)" in written
    assert "![](figures/lags.svg)\n\nWeights by lag.\n" in written and written.count("Not measured yet.") == 2


def test_the_summary_names_which_arms_differ(folder):
    page = quality.summary(quality.finished_experiments(folder))
    assert "simple: confirmed; value, additive, stochastic: not measured" in page
    assert "| +0.0020 [+0.0010, +0.0030] NDCG@10 |" in page
    assert page.count("\n| ") == 2  # the dashes, and the one claim that is measured
    assert quality.summary({}) == "Not measured yet.\n"


def test_curves_are_means_over_seeds(folder):
    figure = quality.figures(quality.finished_experiments(folder))["sasrec"]
    (panel,) = figure.panels
    assert panel.title == "simple"
    assert [(s.label, s.ys) for s in panel.series] == [
        ("plain attention", (0.5, 0.5)),
        ("raw", (0.375, 0.875)),
        ("used", (0.625, 0.625)),
    ]


def test_every_claim_can_be_measured():
    """Its arms and its comparison are those of its experiment."""
    from benchmarks.quality import ctr_sink, din, long_histories, sasrec, stosa

    modules = ctr_sink, din, long_histories, sasrec, stosa
    experiments = {module.EXPERIMENT.name: module.EXPERIMENT for module in modules}
    for claim in CLAIMS:
        assert isinstance(claim, Claim) and claim.experiment in quality.EXPERIMENTS
        assert all((method, claim.over) in experiments[claim.experiment].comparisons for method in claim.methods)
