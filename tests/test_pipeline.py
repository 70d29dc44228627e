"""A whole run at small size, and what people do with it."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import xlog1py, xlogy
from sklearn.metrics import roc_auc_score

from tenrec_jax import __main__ as command_line
from tenrec_jax import artifact, stages
from tenrec_jax.config import STAGES, RunConfig, default_config
from tenrec_jax.data.interactions import open_table
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.opening import record_opening
from tenrec_jax.evaluation.two_stage import CandidateRanker
from tenrec_jax.files import locked
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Rules
from tenrec_jax.run_data import RunData

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "experiments" / "configs"


def tiny_config() -> RunConfig:
    config = default_config()

    def shrink(stage):
        encoder = dataclasses.replace(stage.model.encoder, num_layers=1, width=8, num_heads=2, hidden=8)
        features = dataclasses.replace(stage.model.features, max_length=32)
        model = dataclasses.replace(stage.model, encoder=encoder, features=features)
        train = dataclasses.replace(stage.train, epochs=1)
        return dataclasses.replace(stage, model=model, train=train, events_per_batch=512)

    return dataclasses.replace(
        config,
        name="tiny",
        data=dataclasses.replace(config.data, twin_rows=2500),
        retrieval=shrink(config.retrieval),
        ranking=shrink(config.ranking),
        evaluation=dataclasses.replace(config.evaluation, resamples=50),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Tests read it; those that change something copy it."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    Pipeline(tiny_config(), folder).run()
    return folder


@pytest.fixture(scope="module")
def recommender(workdir: Path) -> Recommender:
    return Recommender.load(workdir / "recommender")


def rows_of_first_user(workdir: Path) -> list[int]:
    lines = (workdir / "source" / "qb_video_twin.csv").read_text().splitlines()[1:]
    users = [line.split(",")[0] for line in lines]
    return [int(line.split(",")[1]) for line, user in zip(lines, users, strict=True) if user == users[0]]


def test_a_run_leaves_the_promised_files(workdir: Path) -> None:
    files = (
        "config.json",
        "env.json",
        "data.json",
        "metrics.jsonl",
        "timings.jsonl",
        "eval/val.json",
        "eval/test.json",
        "eval/val_predictions.parquet",
        "eval/predictions.parquet",
        "eval/recommendations.parquet",
        "eval/test_opened.json",
        "eval/test_details.json",
    )
    for name in (*files, "report.html", "recommender/manifest.json", "DONE"):
        assert (workdir / name).is_file(), name
    for folder in ("tensorboard/retrieval", "checkpoints/retrieval", "checkpoints/ranking", "recommender/index"):
        assert any((workdir / folder).iterdir()), folder


def test_a_run_tells_the_precision_of_its_products(tmp_path: Path) -> None:
    for precision in (None, "float32"):
        folder = tmp_path / str(precision)
        with jax.default_matmul_precision(precision):
            Pipeline(tiny_config(), folder).run(())
        assert json.loads((folder / "env.json").read_text())["matmul_precision"] == (precision or "default")


def test_test_results_have_the_promised_keys(workdir: Path) -> None:
    results = json.loads((workdir / "eval" / "test.json").read_text())
    assert results["protocol"] == "per_user_order"
    assert results["seed"] == 0
    assert results["data_sha256"] == json.loads((workdir / "data.json").read_text())["sha256"]
    for name in ("recall@10", "ndcg@10", "hit@1", "mrr"):
        estimate = results["retrieval"][name]
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert set(results["baselines"]["popularity"]["retrieval"][name]) == {"value", "low", "high"}
    for action in ("click", "like", "share", "follow"):
        assert {"auc", "gauc", "log_loss", "ece"} <= set(results["ranking"][action])
    assert set(results["baselines"]) == {"popularity", "recency", "item_rate", "user_rate", "item_user_rate"}
    assert results["test_opened"] == json.loads((workdir / "eval" / "test_opened.json").read_text())
    assert results["test_opened"]["times"] == 1
    assert "test" not in json.dumps(results["selection"])
    assert 0 <= results["index"]["recall@100_vs_exact"] <= 1
    found = results["index"]["next_clicks"]["recall"]
    assert results["index"]["kind"] == "exact"
    assert 0 < found["with"]["value"] == found["without"]["value"] < 1
    assert set(results["seconds"]) >= set(STAGES[:4])


@pytest.mark.parametrize("part", ["val", "test"])
def test_results_can_be_computed_again_from_the_predictions(workdir: Path, part: str) -> None:
    folder, prefix = workdir / "eval", "" if part == "test" else f"{part}_"
    results = json.loads((folder / f"{part}.json").read_text())
    rows = pq.read_table(folder / f"{prefix}predictions.parquet").to_pydict()
    columns = {name: np.asarray(values, float if None in values else None) for name, values in rows.items()}
    scorers = {"": results, "oracle_": results["oracle"]} | {f"{k}_": v for k, v in results["baselines"].items()}
    for prefix, scorer in scorers.items():
        if "retrieval" in scorer:
            recomputed = retrieval_by_hand(
                columns["user"], columns["item"], columns[f"{prefix}rank"], columns[f"{prefix}tied"]
            )
            for metric, value in recomputed.items():
                assert scorer["retrieval"][metric]["value"] == pytest.approx(value, abs=1e-9), (prefix, metric)
        for action, entry in scorer.get("ranking", {}).items():
            recomputed = ranking_by_hand(
                columns["user"], columns[action], columns[f"{prefix}score_{action}"].astype(float)
            )
            for metric in {"auc", "gauc", "log_loss", "ece", "pcoc"} & set(entry):
                value, expected = entry[metric]["value"], recomputed[metric]
                assert (value is None) == (not math.isfinite(expected)), (prefix, action, metric)
                assert value is None or value == pytest.approx(expected, rel=1e-9), (prefix, action, metric)
    lists = pq.read_table(folder / f"{'' if part == 'test' else 'val_'}recommendations.parquet").to_pydict()
    assert (
        len(lists["user"]) == results["lists"]["users"] == len({*columns["user"][~np.isnan(columns["rank"])].tolist()})
    )
    listed = {item for line in lists["items"] for item in line}
    assert results["lists"]["coverage"] == pytest.approx(len(listed) / results["counts"]["catalogue"])


def ranking_by_hand(user: np.ndarray, label: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Metrics of one action; the ECE is over 15 bins of equal numbers of rows, equal scores in one bin."""
    weighed = [
        (int((user == each).sum()), roc_auc_score(label[user == each], score[user == each]))
        for each in np.unique(user)
        if 0 < label[user == each].sum() < (user == each).sum()
    ]
    rows, positives = len(label), label.sum()
    edges = np.sort(score)[np.arange(1, 15) * rows // 15]
    number = np.array([sum(edge <= value for edge in edges) for value in score])
    gaps = [abs((score - label)[number == index].sum()) for index in range(15)]
    return {
        "auc": roc_auc_score(label, score) if 0 < positives < rows else math.nan,
        "gauc": sum(n * area for n, area in weighed) / sum(n for n, _ in weighed) if weighed else math.nan,
        "log_loss": -np.mean(xlogy(label, score) + xlog1py(1 - label, -score)),
        "ece": sum(gaps) / rows,
        "pcoc": score.sum() / positives if positives else math.nan,
    }


def retrieval_by_hand(user: np.ndarray, item: np.ndarray, rank: np.ndarray, tied: np.ndarray) -> dict[str, float]:
    """Means over users, target by target; ties are broken in every way, each as probable as any other."""
    values: dict[str, list[float]] = {name: [] for name in ("recall@10", "recall@50", "ndcg@10", "hit@10", "mrr")}
    for each in np.unique(user[~np.isnan(rank)]):
        mine = np.flatnonzero((user == each) & ~np.isnan(rank))
        targets = [range(int(rank[t]), int(rank[t] + tied[t]) + 1) for t in mine if rank[t] < np.inf]
        for k in (10, 50):
            shares = [sum(place <= k for place in places) / len(places) for places in targets]
            values[f"recall@{k}"].append(sum(shares) / len(mine))
        gain = sum(sum(1 / np.log2(p + 1) for p in places if p <= 10) / len(places) for places in targets)
        values["ndcg@10"].append(gain / sum(1 / np.log2(p + 1) for p in range(1, min(len(mine), 10) + 1)))
        best = min(targets, key=lambda places: places[0], default=range(0))
        # Of the n places that tie, m are targets: the ways in which the first of them stands t places behind the first place.
        n, m = len(best), len({item[t] for t in mine if best and rank[t] == best[0]})
        first = {best[0] + t: math.comb(n - 1 - t, m - 1) / math.comb(n, m) for t in range(n - m + 1)} if best else {}
        values["hit@10"].append(sum(chance for place, chance in first.items() if place <= 10))
        values["mrr"].append(sum(chance / place for place, chance in first.items()))
    return {name: float(np.mean(entries)) for name, entries in values.items()}


def test_the_oracle_has_the_probabilities_of_the_twins_own_rows(workdir: Path) -> None:
    truth = pq.read_table(workdir / "source" / "qb_video_twin.truth.parquet")
    source = (workdir / "source" / "qb_video_twin.csv").read_text().splitlines()[1:]
    rows = pq.read_table(workdir / "eval" / "predictions.parquet").to_pydict()
    for place, row in enumerate(rows["row"]):
        assert source[row].split(",")[:3] == [str(rows[name][place]) for name in ("user", "item", "click")]
        assert rows["oracle_score_click"][place] == truth["click"][row].as_py()
    assert json.loads((workdir / "eval" / "test.json").read_text())["reachable_gain"]["click"]["auc"] is not None


def test_candidates_are_worth_in_the_evaluation_what_they_are_to_the_recommender(
    workdir: Path, recommender: Recommender
) -> None:
    config, table = tiny_config(), open_table(workdir / "table")
    data = RunData(config, workdir / "table", 1)
    model = artifact.ranker(config.ranking.model, data.vocabulary)
    ranker = CandidateRanker(
        *artifact.with_weights(model, workdir / "recommender" / artifact.RANKING_WEIGHTS),
        table,
        data.model_ids(config.ranking.model.features),
        np.arange(table.num_rows),
        max_length=config.ranking.model.features.max_length,
        action_values=config.serving.rules.action_values,
    )
    raw = recommender.user_ids[2]
    answer = recommender.recommend(user_id=int(raw), k=12, rules=Rules(retrieval_weight=0.0))
    worth = ranker.worth(table.dense_user(raw), table.dense_item([item.item_id for item in answer.items]), 8)
    np.testing.assert_allclose(worth, [item.score for item in answer.items], rtol=1e-5)


def test_a_second_reading_of_the_test_part_is_recorded(workdir: Path, tmp_path: Path) -> None:
    shutil.copytree(workdir / "eval", tmp_path / "eval")
    first = json.loads((tmp_path / "eval" / "test_opened.json").read_text())
    again = record_opening(tmp_path)
    assert again["times"] == 2
    assert again["readings"][0] == first["readings"][0]
    assert json.loads((tmp_path / "eval" / "test_opened.json").read_text()) == again


def test_running_a_finished_run_again_changes_nothing(workdir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    assert Pipeline(tiny_config(), workdir).run() == json.loads((workdir / "eval" / "test.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_a_workdir_of_another_config_is_refused_with_the_difference(workdir: Path) -> None:
    retrieval = dataclasses.replace(tiny_config().retrieval, negatives=7)
    changed = dataclasses.replace(tiny_config(), retrieval=retrieval)
    with pytest.raises(UserError, match=r"retrieval\.negatives: 512 in the workdir, 7 now"):
        Pipeline(changed, workdir)


def copied(workdir: Path, place: Path, *, without: Sequence[str] = ()) -> Path:
    """A copy of a run in which some stages are not finished."""
    shutil.copytree(workdir, place)
    records = stages.read(place)
    stages.write(place, {stage: records[stage] for stage in records if stage not in without})
    return place


def test_an_unfinished_run_of_other_code_is_refused_and_a_finished_one_is_told(workdir: Path, tmp_path: Path) -> None:
    for name, without in (("finished", ()), ("unfinished", ["export"])):
        folder = copied(workdir, tmp_path / name, without=without)
        environment = json.loads((folder / "env.json").read_text())
        environment["code"] |= {"jax": "0.1", "tenrec_jax sources": "other"}
        (folder / "env.json").write_text(json.dumps(environment))
    assert Pipeline(tiny_config(), tmp_path / "finished").run()
    with pytest.raises(UserError, match=r"jax: .0\.1. in the workdir, ") as error:
        Pipeline(tiny_config(), tmp_path / "unfinished")
    assert "tenrec_jax sources: 'other' in the workdir, " in str(error.value)
    assert "--allow_changed" in str(error.value)


def test_what_changes_on_the_way_is_told_recorded_and_repeated_by_the_results(
    workdir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(workdir, tmp_path / "run", without=["validate", "evaluate", "export"])
    changed = dataclasses.replace(tiny_config(), evaluation=dataclasses.replace(tiny_config().evaluation, resamples=20))
    with caplog.at_level("WARNING"):
        results = Pipeline(changed, folder, allow_changed=True).run()
    line = "  config.evaluation.resamples: 50 in the workdir, 20 now"
    assert line in caplog.text
    assert "kept as they are (data, retrieval, index, ranking)" in caplog.text
    expected = [{"kept": ["data", "retrieval", "index", "ranking"], "changed": [line]}]
    assert json.loads((folder / "changes.json").read_text()) == expected == results["changes_while_running"]
    assert "the run was changed on the way" in (folder / "report.html").read_text()
    assert Pipeline(changed, folder).run() == results  # from now on it is this configuration's


def test_a_log_that_changed_is_refused_and_one_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    write_twin(log, kind="qb_video", rows=600, seed=0, progress=False)
    config = dataclasses.replace(tiny_config(), data=dataclasses.replace(tiny_config().data, path=str(log)))
    Pipeline(config, tmp_path / "run").run(["data"])
    text = log.read_text()
    log.write_text(text.replace("1", "2", 1))
    with pytest.raises(UserError, match=r"log\.csv: SHA-256 \w{12} in the workdir's table, \w{12} now"):
        Pipeline(config, tmp_path / "run")
    log.unlink()
    Pipeline(config, tmp_path / "run")


def test_two_processes_do_not_run_in_one_workdir(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", "tests"), pytest.raises(UserError, match=r"Another process runs in .*Wait for it"):
        Pipeline(tiny_config(), tmp_path).run(["data"])


def test_damaged_records_of_finished_stages_are_set_aside_and_told(
    workdir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest of the run is proven in test_kills.py; here: what is told, and that the table is used as it is."""
    folder = copied(workdir, tmp_path / "run")
    text = (folder / stages.FILE).read_text()
    (folder / stages.FILE).write_text(text.replace("seconds", "sekunden", 1))
    assert stages.check(folder)
    with caplog.at_level("WARNING"):
        Pipeline(tiny_config(), folder).run(["data"])
    assert "stages.json is damaged" in caplog.text
    assert (folder / "set-aside" / stages.FILE).exists()
    assert list(stages.read(folder)) == ["data"]
    assert not (folder / "DONE").exists()


def test_every_file_that_a_stage_left_is_checked(workdir: Path, tmp_path: Path) -> None:
    assert stages.check(workdir) == []
    for pattern in (
        "data.json",
        "table/columns/*.npy",
        "recommender/index/*",
        "eval/val.json",
        "recommender/*.parquet",
    ):
        folder = copied(workdir, tmp_path / pattern.replace("/", "_").replace("*", "x"))
        path = sorted(folder.glob(pattern))[0]
        path.write_bytes(path.read_bytes()[:-1])
        assert [problem for problem in stages.check(folder) if str(path) in problem], path


def test_stages_out_of_order_or_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ranking needs data, retrieval, index first"):
        Pipeline(tiny_config(), tmp_path / "a").run(["ranking"])
    with pytest.raises(UserError, match="rankign is no stage"):
        Pipeline(tiny_config(), tmp_path / "b").run(["rankign"])


def test_recommendations_are_unseen_catalogue_items_in_order_of_worth(recommender: Recommender, workdir: Path) -> None:
    seen, user = set(rows_of_first_user(workdir)), int(recommender.user_ids[0])
    answer = recommender.recommend(user_id=user, k=10, explain=True)
    items = [item.item_id for item in answer.items]
    assert len(set(items)) == 10
    assert answer.retrieved is not None
    best = answer.retrieved[0].retrieval_score
    assert not seen & set(items)
    for item in answer.items:
        assert set(item.probabilities) == {"click", "like", "share", "follow"}
        worth = sum(
            w * item.probabilities[a] for a, w in zip(("click", "like", "share", "follow"), (1, 2, 4, 3), strict=True)
        )
        assert item.score == pytest.approx(worth * np.exp(item.retrieval_score - best), rel=1e-5)
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
    assert set(answer.milliseconds) == {"state", "search", "rank", "rules", "total"}
    again = recommender.recommend(user_id=user, k=10, explain=True)
    assert answer == dataclasses.replace(again, milliseconds=answer.milliseconds)


def test_fewer_items_asked_for_are_the_first_of_more(recommender: Recommender) -> None:
    user = int(recommender.user_ids[3])
    assert recommender.recommend(user_id=user, k=3).items == recommender.recommend(user_id=user, k=30).items[:3]


def test_k_beyond_the_catalogue_gives_every_unseen_trained_item_once(recommender: Recommender) -> None:
    answer = recommender.recommend(history=[], k=10**6)
    items = [item.item_id for item in answer.items]
    assert len(items) == len(set(items)) == recommender.catalogue_size
    (seen,) = recommender.recommend(history=items[:5], k=10**6).effects
    assert (seen.rule, sorted(seen.removed)) == ("seen", sorted(items[:5]))


def test_unknown_items_in_a_history_are_named_and_read_as_unknown(recommender: Recommender) -> None:
    answer = recommender.recommend(history=[1, 10**15, 2], k=5)
    assert answer.unknown_items == (10**15,)
    assert answer.history_length == 3
    assert len(answer.items) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user_id": 10**15}, "user_id 1000000000000000 is not in the log"),
        ({}, "either a user_id or a history"),
        ({"user_id": 1, "history": [1]}, "either a user_id or a history"),
        ({"history": ["a"]}, r"history\[0\] is 'a'"),
        ({"history": [1], "k": 0}, "k is 0"),
        ({"history": [1], "k": 2.5}, "k is 2.5"),
    ],
)
def test_wrong_requests_are_refused(recommender: Recommender, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recommender.recommend(**arguments)


def test_a_recommender_answers_alike_after_it_was_moved(
    recommender: Recommender, workdir: Path, tmp_path: Path
) -> None:
    shutil.copytree(workdir / "recommender", tmp_path / "elsewhere")
    moved = Recommender.load(tmp_path / "elsewhere")
    assert moved.recommend(history=[1, 2], k=20).items == recommender.recommend(history=[1, 2], k=20).items


@pytest.mark.parametrize("name", ["retrieval.safetensors", "users.parquet", "rules.json", "index/index.json"])
def test_a_damaged_or_missing_file_is_named(workdir: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "recommender"
    shutil.copytree(workdir / "recommender", folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Recommender.load(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Recommender.load(folder)


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = command_line.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_recommend_command_prints_a_table_or_json(
    run_command: Callable, workdir: Path, recommender: Recommender
) -> None:
    user = recommender.user_ids[0]
    code, table, _ = run_command("recommend", "--recommender", workdir / "recommender", "--user", user, "--k", 3)
    assert code == 0
    _, text, _ = run_command("recommend", "--recommender", workdir / "recommender", "--user", user, "--k", 3, "--json")
    answer = json.loads(text)
    assert [item["item_id"] for item in answer["items"]] == [int(line.split()[1]) for line in table.splitlines()[1:4]]
    _, nobody, _ = run_command("recommend", "--recommender", workdir / "recommender", "--history", "", "--k", 3)
    assert len(nobody.splitlines()) == 6


def test_commands_fail_with_one_message_and_code_2(run_command: Callable, workdir: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("recommend", "--recommender", tmp_path, "--user", 1), "is not a recommender"),
        (("recommend", "--recommender", workdir / "recommender", "--user", "x"), "'x' is not an integer id"),
        (("recommend", "--recommender", workdir / "recommender", "--user", 10**15), "is not in the log"),
        (("ingest", tmp_path / "none.csv", "--kind", "qb_video", "--out", tmp_path / "t"), "none.csv"),
        (("report", tmp_path), "config.json"),
    ):
        code, out, err = run_command(*arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert "Traceback" not in err


def launch(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    """Run the launcher; its programs are compiled quickly, and once for all tests that ask for the same ones."""
    command = [sys.executable, ROOT / "experiments" / "launch.py", *arguments]
    quickly = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | quickly
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_launch_refuses_a_misspelt_key_with_a_suggestion(tmp_path: Path) -> None:
    result = launch("--config.retreival.negatives=3", folder=tmp_path)
    assert result.returncode == 2
    assert "retrieval" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_launch_takes_heads_and_attention_from_the_command_line(tmp_path: Path) -> None:
    model = "--config.ranking.model"
    settings = f"{model}.heads.kind=mmoe", f"{model}.encoder.attention=softmax", f"{model}.encoder.num_layers=1"
    result = launch(*settings, "--dry_run", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "head/towers/kernel" in result.stdout
    assert "attention/query_weight" not in result.stdout.partition("ranker, for a log")[2]


def test_launch_help_teaches(tmp_path: Path) -> None:
    result = launch("--help", folder=tmp_path)
    assert result.returncode == 0
    for expected in (
        "--config",
        "--workdir",
        "--stages",
        "--[no]dry_run",
        "sequences.py",
        "quickstart.py",
        "the same command again",
    ):
        assert expected.lower() in result.stdout.lower(), expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(f"tenrec:{kind}" for kind in ("qb_video", "qk_video", "ctr_1m")),
        "original",
        "quickstart",
        "sequences",
        "movielens",
    ],
)
def test_every_config_dry_runs(name: str, tmp_path: Path) -> None:
    stem, _, variant = name.partition(":")
    path = CONFIGS / f"{stem}.py"
    result = launch(f"--config={path}{':' if variant else ''}{variant}", "--dry_run", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "two-tower" in result.stdout
    for stage in ("retrieval", "ranking")[: 1 if name == "sequences" else 2]:
        assert f"{stage}, a training step of" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("variant", "file"), [("ctr_1m", "ctr_data_1M.csv"), ("qk_video", "QK-video.csv")])
def test_a_missing_licensed_file_is_explained(variant: str, file: str, tmp_path: Path) -> None:
    result = launch(f"--config={CONFIGS / 'tenrec.py'}:{variant}", folder=tmp_path)
    assert result.returncode == 2
    for expected in (f"data/tenrec/{file}", "CC BY-NC 4.0", "2022-NIPS-Tenrec"):
        assert expected in result.stderr


@pytest.mark.parametrize("kind", ["qb_video", "ctr_1m"])
def test_files_of_exactly_tenrecs_format_are_taken(kind: str, tmp_path: Path) -> None:
    names = {"qb_video": "QB-video.csv", "ctr_1m": "ctr_data_1M.csv"}
    write_twin(tmp_path / "data" / "tenrec" / names[kind], kind=kind, rows=2000, seed=1, progress=False)
    result = launch(f"--config={CONFIGS / 'tenrec.py'}:{kind}", "--stages=data", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "runs" / f"tenrec_{kind}" / "data.json").read_text())
    assert record["manifest"]["counts"]["rows"] == 2000
    assert not record["is_synthetic"]


def test_a_log_of_clicks_alone_runs_to_a_recommender_without_a_ranker(tmp_path: Path) -> None:
    # Each item is mostly followed by the next one, which co-visits know and an epoch does not teach.
    random = np.random.default_rng(0)
    starts = random.integers(0, 60, 81)
    lines = [
        f"{user} {' '.join(str((starts[user] + 7 * place) % 60 + 1) for place in range(2 + user % 7))}"
        for user in range(1, 81)
    ]
    (tmp_path / "log.txt").write_text("\n".join([*lines, "81 5"]) + "\n")
    config = tiny_config()
    data = dataclasses.replace(config.data, kind="sequences", path=str(tmp_path / "log.txt"), protocol="leave_one_out")
    ranking = dataclasses.replace(config.ranking, enabled=False, co_visits=20)
    config = dataclasses.replace(config, data=data, ranking=ranking)
    results = Pipeline(config, tmp_path / "run").run()
    assert "ranking" not in results
    assert results["counts"]["users"] == sum(2 + user % 7 >= 3 for user in range(1, 81))
    # Of so small a catalogue 99 negatives are all there is.
    for metric, sampled in results["retrieval_1+99"].items():
        assert sampled["value"] == pytest.approx(results["retrieval"][metric]["value"])
    assert "99 uniform negatives" in (tmp_path / "run" / "report.html").read_text()
    # All items are candidates, so that the pair's order is the one over the full catalogue.
    both, pair = results["both_stages"], results["two_stage"]["recall"]
    assert pair["pair"]["value"] == pytest.approx(both["retrieval"]["recall@20"]["value"])
    assert pair["retrieval"]["value"] == pytest.approx(results["retrieval"]["recall@20"]["value"])
    assert both["retrieval"]["ndcg@10"] != results["retrieval"]["ndcg@10"]
    left = [tmp_path / "run" / "recommender" / name for name in ("co_visits.safetensors", "order.json")]
    content = [path.read_bytes() for path in left]
    left[0].unlink()
    assert Pipeline(config, tmp_path / "run").run() == results
    assert [path.read_bytes() for path in left] == content
    answer = Recommender.load(tmp_path / "run" / "recommender").recommend(user_id=81, k=5)
    assert [item.probabilities for item in answer.items] == [{}] * 5
    assert 5 not in [item.item_id for item in answer.items]


def test_a_log_too_small_for_its_protocol_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("1 5 6\n2 7\n")
    config = tiny_config()
    data = dataclasses.replace(config.data, kind="sequences", path=str(tmp_path / "log.txt"), protocol="leave_one_out")
    config = dataclasses.replace(config, data=data, ranking=dataclasses.replace(config.ranking, enabled=False))
    with pytest.raises(UserError, match="leaves no validation clicks"):
        Pipeline(config, tmp_path / "run").run()
