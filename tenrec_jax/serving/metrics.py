"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The numbers of one server, in a registry of their own.

    Attributes:
        requests: by endpoint and status. seconds: by endpoint, from the first byte of a request to the last of its answer.
        stage_seconds: by stage of an answer ("queue", "state", "search", "rank", "rules").
        batch_size: requests that were answered together. waiting: requests in the queue.
        recommender: 1 at the version that answers. loaded: when it was put in place. ready: whether there is one.
        swaps: by outcome, "done" or "refused". refused: whether the folder holds one that cannot be loaded.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("tenrec_requests_total", "Answers.", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            "tenrec_request_seconds", "Time to answer.", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.stage_seconds = Histogram(
            "tenrec_stage_seconds", "Time in a stage of an answer.", ["stage"], buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "tenrec_batch_size", "Requests answered together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.waiting = Gauge("tenrec_waiting_requests", "Requests that wait for their turn.", registry=registry)
        self.recommender = Gauge(
            "tenrec_recommender_info", "1 at the version that answers.", ["version"], registry=registry
        )
        self.loaded = Gauge("tenrec_recommender_loaded_timestamp_seconds", "When it was loaded.", registry=registry)
        self.ready = Gauge("tenrec_ready", "1 once a recommender is loaded and warm.", registry=registry)
        self.swaps = Counter(
            "tenrec_swaps_total", "New recommenders found in the folder.", ["outcome"], registry=registry
        )
        self.refused = Gauge(
            "tenrec_swap_refused", "1 while the folder holds a recommender that cannot be loaded.", registry=registry
        )

    def text(self) -> bytes:
        """All numbers, in Prometheus' text format."""
        return generate_latest(self._registry)
