"""Names of what lies in a run's folder; `observe.folder` says what each holds."""

CONFIG, METRICS, SAMPLES, TENSORBOARD = "config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard"
BOOKS, CHECKPOINTS, SUPERSEDED = "books.jsonl", "checkpoints", "superseded"
TIMELINE, TRACE = "timeline.jsonl", "trace.json"
REPORT, TRACKERS = "report.html", "trackers.json"
REWARD_CACHE = "rewards.jsonl"
LOGS = "logs"
