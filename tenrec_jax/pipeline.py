"""The stages of a run, from a raw log to a recommender.

    data       make the twin if no source is named, ingest, split     table/  data.json
    retrieval  train the two-tower                                    checkpoints/retrieval/  recommender/retrieval.safetensors
    index      search structure over the item vectors                 recommender/index/
    ranking    train the Fastformer ranker                            checkpoints/ranking/  recommender/ranking.safetensors
               count co-visits, fit the order of candidates           recommender/co_visits.safetensors  recommender/order.json
    validate   evaluate on the validation part                        eval/val*
    evaluate   evaluate, once, on the test part                       eval/
    export     id maps, histories, rules, manifest; the report        recommender/  report.html

A finished stage is written down in `stages.json` with the hashes of what it left, and not run again while these hold; an unfinished one
goes on from its checkpoint. Of several processes all train, and the first alone runs the other stages while the rest wait.
"""

import dataclasses
import logging
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tenrec_jax import artifact, provenance, stages
from tenrec_jax.co_visits import CoVisits, count_co_visits
from tenrec_jax.config import STAGES, DataConfig, RunConfig, refuse_missing_sources
from tenrec_jax.data.ingest import IngestOptions, ingest
from tenrec_jax.data.interactions import RawId
from tenrec_jax.data.logs import parse_columns
from tenrec_jax.data.manifest import read_manifest
from tenrec_jax.data.protocols import Part
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.errors import UserError
from tenrec_jax.evaluate_stage import INDEX_QUERIES, Models, evaluate, second_stage
from tenrec_jax.evaluation.evaluator import item_vectors
from tenrec_jax.evaluation.metrics import auc, grouped_auc, ndcg_at_k, recall_at_k
from tenrec_jax.evaluation.report import write_report
from tenrec_jax.evaluation.two_stage import fitted_order
from tenrec_jax.files import full_disk, locked, read_json, write_json, write_text
from tenrec_jax.models.ranker import Ranker, TimelineRanker
from tenrec_jax.order import Order
from tenrec_jax.retrieval.index import build_index, load_index
from tenrec_jax.run_data import RunData
from tenrec_jax.sealed import DamagedError
from tenrec_jax.training.heartbeat import Heartbeat
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.stopping import Stopping
from tenrec_jax.training.tasks import RankingTask, RetrievalTask
from tenrec_jax.training.trainer import TrainConfig, fit

logger = logging.getLogger(__name__)

TRAINED_STAGES = ("retrieval", "ranking")
CHANGES = "changes.json"


class Pipeline:
    """One run: a configuration and the folder that holds what it made.

    Args:
        config: of the run.
        workdir: made by `run` if absent; in a run of several processes, one that all share.
        parallel: devices to train on; by default all there are.
        stopping: hears whether the run is told to stop.
        heartbeat: tells a launcher that training gets on.
        allow_changed: go on in a workdir of another configuration, other data or other code. What was finished is kept as it is, and
            the changes are recorded in `changes.json`, which results repeat.

    Raises:
        UserError: the folder holds a run of another configuration, data or code; the message lists the differences.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        parallel: DataParallel | None = None,
        *,
        stopping: Stopping | None = None,
        heartbeat: Heartbeat | None = None,
        allow_changed: bool = False,
    ) -> None:
        self.config, self.workdir = config, workdir
        self._changed = _changes(config, workdir)
        if self._changed and not allow_changed:
            remedy = "Name another --workdir, remove this one, or go on in it all the same: --allow_changed."
            raise UserError("\n".join([f"{workdir} holds a run that was made otherwise:", *self._changed, remedy]))
        self._parallel = parallel or DataParallel()
        self._stopping, self._heartbeat = stopping or Stopping(), heartbeat or Heartbeat()
        self._data = RunData(config, workdir / "table", self._parallel.size)

    def run(self, wanted: Sequence[str] = STAGES) -> dict[str, Any]:
        """Run the named stages in their order, skipping finished ones.

        Returns:
            The results of the test evaluation; empty if it has not run.

        Raises:
            UserError: an unknown stage, a stage whose predecessor has not run, bad input, no room, or another process in this workdir.
            Stopped: the run was told to stop.
        """
        unknown = sorted(set(wanted) - set(STAGES))
        if unknown:
            raise UserError(f"--stages: {', '.join(unknown)} is no stage. The stages are {', '.join(STAGES)}.")
        if not (self.workdir / stages.FILE).exists():
            refuse_missing_sources(self.config.data)
        is_main = self._parallel.is_main
        with locked(self.workdir / ".lock", f"runs in {self.workdir}") if is_main else nullcontext():
            try:
                self._run(wanted)
            except Exception as error:
                if isinstance(error, UserError) or not full_disk(error):
                    raise
                raise UserError(
                    f"{self.workdir} has no room: {error}. What was finished is whole; make room there and run the same command again."
                ) from error
        results = self.workdir / "eval" / "test.json"
        return read_json(results) if results.exists() else {}

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return (self.workdir / "DONE").exists()

    def _run(self, wanted: Sequence[str]) -> None:
        damaged: dict[str, Any] = {}
        if self._parallel.is_main:
            damaged = stages.take_out_damaged(self.workdir)
            self._begin()
        # The main process looks, and the others see what it has seen.
        done = self._agreed(self._records())
        for place, stage in enumerate(STAGES):
            if stage not in wanted or stage in done:
                continue
            missing = [earlier for earlier in STAGES[:place] if earlier not in done]
            if missing:
                raise UserError(f"Stage {stage} needs {', '.join(missing)} first: add them to --stages.")
            began = time.perf_counter()
            logger.info("[%d/%d] %s", place + 1, len(STAGES), stage)
            self._stopping.place = f"in stage {stage}"
            if self._parallel.is_main or stage in TRAINED_STAGES:
                getattr(self, f"_run_{stage}")()
            if self._parallel.is_main:
                stages.finish(self.workdir, stage, time.perf_counter() - began, damaged.get(stage))
            done = self._agreed(self._records())
        if self._parallel.is_main and done.issuperset(STAGES) and not self.finished:
            write_text(self.workdir / "DONE", "")

    def _begin(self) -> None:
        """Write down how the run is made; on a workdir of another one that is allowed to change, what changes."""
        if not set(STAGES) <= set(self._records()):
            (self.workdir / "DONE").unlink(missing_ok=True)
        if self._changed:
            kept = ", ".join(self._records()) or "none"
            logger.warning(
                "%s was made otherwise:\n%s\nStages that are finished are kept as they are (%s); the rest is made with what is set now, "
                "going on from checkpoints where there are any. %s records this, and the results will say so.",
                self.workdir,
                "\n".join(self._changed),
                kept,
                CHANGES,
            )
            finished = list(self._records())
            write_json(self.workdir / CHANGES, [*self._changes_before(), {"kept": finished, "changed": self._changed}])
        if self._changed or not (self.workdir / provenance.CONFIG).exists():
            write_json(self.workdir / provenance.ENVIRONMENT, _environment(self._parallel))
            write_json(self.workdir / provenance.CONFIG, dataclasses.asdict(self.config))

    def _agreed(self, records: dict[str, Any]) -> set[str]:
        """The finished stages that the main process sees."""
        number = self._parallel.from_main(float(sum(1 << STAGES.index(stage) for stage in records)))
        return {stage for place, stage in enumerate(STAGES) if int(number) >> place & 1}

    def _records(self) -> dict[str, Any]:
        return stages.read(self.workdir) if self._parallel.is_main else {}

    def _changes_before(self) -> list[dict[str, Any]]:
        path = self.workdir / CHANGES
        return read_json(path) if path.exists() else []

    @property
    def recommender(self) -> Path:
        """Folder of the recommender."""
        return self.workdir / "recommender"

    def example_user(self) -> RawId:
        """Raw id of a user of the log."""
        return self._data.table.users.raw_id[1:2].tolist()[0]

    def _run_data(self) -> None:
        config, source = self.config.data, Path(self.config.data.path)
        if not config.path:
            # Even if it is there: whatever was interrupted or damaged, these are its bytes.
            source = self._twin
            write_twin(source, kind=config.kind, rows=config.twin_rows, seed=config.twin_seed)
        try:
            ingest([source], config.kind, self.workdir / "table", ingest_options(config))
        except DamagedError as error:
            logger.warning("%s\nIt is set aside and made again.", error)
            stages.set_aside(self.workdir, ["table"])
            ingest([source], config.kind, self.workdir / "table", ingest_options(config))
        split = self._data.split
        record = {
            "source": source.name,
            "is_synthetic": not config.path,
            "sha256": self._data.table.sha256,
            "protocol": split.protocol,
            "split_sha256": split.sha256,
            "split_seed": split.seed,
            "users_left_out": split.users_left_out,
            "rows": {part.name.lower(): len(split.rows(part)) for part in Part},
            "manifest": read_json(self.workdir / "table" / "manifest.json"),
        }
        write_json(self.workdir / "data.json", record)

    def _run_retrieval(self) -> None:
        evaluator = self._data.retrieval_evaluator(Part.VALIDATION, self.config.retrieval.selection_users)

        def evaluate(parameters: Any) -> tuple[float, dict[str, float]]:
            places = evaluator.run(task.graphdef, task.whole(parameters)).places
            ndcg = ndcg_at_k(places, 10)
            return ndcg, {"validation/recall@10": recall_at_k(places, 10), "validation/ndcg@10": ndcg}

        task = self._data.retrieval_task(evaluate)
        self._fit(task, self.config.retrieval.train, artifact.RETRIEVAL_WEIGHTS)

    def _run_index(self) -> None:
        known = self._data.known_items
        evaluator = self._data.retrieval_evaluator(Part.VALIDATION, INDEX_QUERIES)
        query_BD = evaluator.queries(*self._two_tower)
        index = build_index(self._item_vectors()[known - 1], known, self.config.index, tuning_queries_BD=query_BD)
        index.save(self.recommender / artifact.INDEX)

    def _run_ranking(self) -> None:
        if self.config.ranking.enabled:
            task = selected_ranking_task(self._data)
            self._fit(task, self.config.ranking.train, artifact.RANKING_WEIGHTS)
        else:
            logger.info("no ranker: this log holds no exposures without a click, so nothing true to learn from")
        if self._parallel.is_main:
            self._order_candidates()

    def _order_candidates(self) -> None:
        """Count the co-visits, and fit the order of candidates that they have a part in."""
        co_visits, order = self.recommender / artifact.CO_VISITS, self.recommender / artifact.ORDER
        if not self.config.ranking.co_visits:
            co_visits.unlink(missing_ok=True)  # of a run that was made otherwise
            order.unlink(missing_ok=True)
            return
        data, part = self._data, Part.VALIDATION
        counts = count_co_visits(
            data.table, data.split.rows(Part.TRAIN), self.config.ranking.co_visits, seed=self.config.seed
        )
        counts.save(co_visits)
        models, evaluator = dataclasses.replace(self._trained, co_visits=counts), data.retrieval_evaluator(part, 0)
        fitted = fitted_order(
            second_stage(self.config, data, models, part, evaluator),
            evaluator.queries(*self._two_tower),
            models.vectors_ND,
            models.index,
            self.config.serving.candidates,
            self.config.seed,
        )
        write_json(order, dataclasses.asdict(fitted))
        logger.info(
            "order of candidates: retrieval's odds to the power of %.2f, co-visits' to %.2f, popularity's to %.2f, subjects' to %.2f; "
            "of what an event says by co-visits, each one after it leaves %g",
            *dataclasses.astuple(fitted),
        )

    def _run_validate(self) -> None:
        self._evaluate(Part.VALIDATION)

    def _run_evaluate(self) -> None:
        self._evaluate(Part.TEST)

    def _evaluate(self, part: Part) -> None:
        seconds = {stage: record["seconds"] for stage, record in self._records().items()}
        truth = None if self.config.data.path else self._twin.with_suffix(".truth.parquet")
        evaluate(self.config, self.workdir, self._data, self._models, part, seconds, truth, self._changes_before())

    def _run_export(self) -> None:
        artifact.finish(
            self.recommender,
            table=self._data.table,
            categories=read_manifest(self.workdir / "table").categories,
            trained=self._data.trained,
            vocabulary=self._data.vocabulary,
            retrieval=self.config.retrieval,
            ranking=self.config.ranking,
            serving=self.config.serving,
        )
        write_report(self.workdir)

    def _fit(self, task: RetrievalTask | RankingTask, config: TrainConfig, weights: str) -> None:
        for line in task.collisions():
            logger.info("%s", line)
        result = fit(
            task,
            config,
            workdir=self.workdir,
            seed=self.config.seed,
            parallel=self._parallel,
            stopping=self._stopping,
            heartbeat=self._heartbeat,
            origin={"data_sha256": self._data.table.sha256},
        )
        if self._parallel.is_main:
            artifact.save_weights(self.recommender / weights, task.whole(result.parameters))

    @property
    def _twin(self) -> Path:
        return self.workdir / "source" / f"{self.config.data.kind}_twin.csv"

    @cached_property
    def _models(self) -> Models:
        if not self.config.ranking.co_visits:
            return self._trained
        return dataclasses.replace(
            self._trained,
            co_visits=CoVisits.load(self.recommender / artifact.CO_VISITS),
            order=artifact.load_order(self.recommender / artifact.ORDER),
        )

    @cached_property
    def _trained(self) -> Models:
        """The models, before co-visits have a part in the order."""
        return Models(
            self._two_tower,
            self._ranker if self.config.ranking.enabled else None,
            None,
            Order(),
            self._item_vectors(),
            load_index(self.recommender / artifact.INDEX),
        )

    def _item_vectors(self) -> np.ndarray:
        model_ids = self._data.model_ids(self.config.retrieval.model.features)
        return np.asarray(item_vectors(*self._two_tower, model_ids, self._data.table))

    @cached_property
    def _two_tower(self) -> artifact.Model:
        model = artifact.two_tower(self.config.retrieval.model, self._data.vocabulary)
        return artifact.with_weights(model, self.recommender / artifact.RETRIEVAL_WEIGHTS)

    @cached_property
    def _ranker(self) -> artifact.Model:
        model = artifact.ranker(self.config.ranking.model, self._data.vocabulary)
        return artifact.with_weights(model, self.recommender / artifact.RANKING_WEIGHTS)


def selected_ranking_task(data: RunData, ranker: Callable[..., TimelineRanker] = Ranker) -> RankingTask:
    """The ranking stage's task, whose epochs are chosen by the mean of click AUC and GAUC on the validation rows.

    Args:
        data: of the run.
        ranker: makes the model, with the arguments of `Ranker`.
    """
    evaluator, rows = data.ranking_evaluator(Part.VALIDATION), data.split.rows(Part.VALIDATION)
    label_R, user_R = data.table.labels_RA[rows, 0], data.table.user_R[rows]

    def evaluate(parameters: Any) -> tuple[float, dict[str, float]]:
        probability_R = evaluator.run(task.graphdef, task.whole(parameters))[rows, 0]
        pooled, grouped = auc(label_R, probability_R), grouped_auc(label_R, probability_R, groups=user_R).value
        return (pooled + grouped) / 2, {"validation/click_auc": pooled, "validation/click_gauc": grouped}

    task = data.ranking_task(evaluate, ranker)
    return task


def _changes(config: RunConfig, workdir: Path) -> list[str]:
    """What differs from the run in a workdir, a line each. Of a finished run, the code that would go on does not matter."""
    changed = provenance.changed_config(config, workdir)
    try:
        finished = stages.read(workdir)
    except DamagedError:
        finished = {}  # told when the run begins
    if "data" in finished:
        changed += provenance.changed_data(config, workdir)
    return changed if set(STAGES) <= set(finished) else changed + provenance.changed_code(workdir)


def _environment(parallel: DataParallel) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{device.platform}:{device.device_kind}" for device in parallel.devices],
        "processes": parallel.process_count,
        "parallel": parallel.how,
        # GPUs round the factors of float32 products unless told otherwise.
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",  # type: ignore[attr-defined]
        "command": sys.argv,
        "code": provenance.code(),
    }


def ingest_options(config: DataConfig) -> IngestOptions:
    """How a run's log is taken in.

    Raises:
        UserError: `columns` is not a JSON object, or makes a feature of what is known only after the exposure.
    """
    columns = parse_columns(config.columns, "config.data.columns") if config.columns else None
    return IngestOptions(
        columns,
        config.duplicates,
        config.max_bad_fraction,
        ids=config.ids,
        allow_post_event_features=config.allow_post_event_features,
    )
