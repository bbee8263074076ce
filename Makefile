# Everything a person or CI does here; `make help` lists it. CI calls nothing else.
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = pyproject.toml infra/constraints.txt infra/environment.py

.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))
.DEFAULT_GOAL := help

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.pipeline ## the environment (made by itself when another target needs it)

$(VENV)/.pipeline: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline && touch $@

EXTRAS = pipeline spark ray tensorboard search video open_clip onnx team infra dev fuzz browser bench build audit
$(VENV)/.audit: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline dev audit && touch $@ $(VENV)/.pipeline $(VENV)/.dev

update-constraints: $(VENV)/.audit ## infra/constraints.txt anew: newest versions within pyproject.toml's bounds, with hashes
	@UV_CUSTOM_COMPILE_COMMAND="make update-constraints" $(VENV)/bin/uv pip compile --quiet --upgrade --universal \
		--python-version 3.11 --generate-hashes $(EXTRAS:%=--extra %) --output-file infra/constraints.txt pyproject.toml
	@git diff --stat infra/constraints.txt

audit: $(VENV)/.audit ## known weaknesses of the versions in infra/constraints.txt; asks PyPI
	@$(VENV)/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r infra/constraints.txt \
		|| { echo "audit: not clean; \"not found on PyPI\" means that PyPI's service of weaknesses did not answer" >&2; exit 1; }

$(VENV)/.dev: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline dev && touch $@ $(VENV)/.pipeline

demo: $(VENV)/.pipeline ## from image URLs to a registered CLIP model, on this machine, in ten minutes
	@$(PY) -m flows run pipeline demo

test: $(VENV)/.dev ## all tests but the slow ones
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n logical --maxprocesses 8 --dist loadfile

check: $(VENV)/.dev ## lint, format, types, import contracts
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . 
	@$(VENV)/bin/mypy && $(VENV)/bin/lint-imports --no-logo

test-guides: $(VENV)/.dev ## a stage, a metric and a loss added to a copy as CONTRIBUTING.md says (2 min)
	@$(PY) -m pytest tests/test_guides.py

coverage: $(VENV)/.dev ## test coverage of the pure modules
	@$(PY) -m pytest -m "not slow" --cov --cov-report=term:skip-covered

test-faults: $(VENV)/.dev ## kill -9 of flow, download and rank at three moments each, and compare (20 min)
	@PYTHONPATH=. $(PY) tests/faults/interruptions.py

test-download-faults: $(VENV)/.dev ## 5,000 faulty URLs on loopback, kill -9 at ten random moments, the network cut off (6 min)
	@PYTHONPATH=. $(PY) tests/faults/downloads.py
	@$(PY) -m pytest -m slow tests/tasks/download

test-resume: $(VENV)/.dev ## two epochs over one, two and three ranks with kills, reading processes too (1 min)
	@$(PY) -m pytest tests/evaclip_model/test_reader_resume.py

test-train-faults: $(VENV)/.dev ## kill -9 ranks at random moments, also within a save, go on with as many or others, and compare (15 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/faults/training.py

test-train-grid: $(VENV)/.dev ## 20 steps on 1, 2, 3 ranks in 1, 2, 4 parts, with every setting that touches the step (2 min)
	@$(PY) -m pytest -m slow tests/evaclip_model/test_step.py

$(VENV)/.browser: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline dev browser && touch $@ $(VENV)/.pipeline $(VENV)/.dev

test-browser: $(VENV)/.browser ## the demo from the form in Prefect's UI to the model in MLflow's, the search page; needs chromium-driver (4 min)
	@$(PY) -m pytest -m slow tests/browser

pictures: $(VENV)/.browser ## the same, and what was on the screen, reports too, into docs/pictures
	@PICTURES=docs/pictures $(PY) -m pytest -m slow tests/browser

test-crash-table: $(VENV)/.dev ## kill, cancel and cut off a training that a worker runs, in every way; what Prefect and MLflow show (20 min)
	@PYTHONPATH=. $(PY) tests/faults/orchestration.py

test-launch: $(VENV)/.dev ## kill -9 of every launcher, preempted Slurm jobs, ranks that verify and embed, MLflow away for a while (6 min)
	@$(PY) -m pytest -m slow tests/tasks/train tests/tasks/lineage tests/tasks/verify tests/tasks/embed

test-retrain: $(VENV)/.dev ## three weeks of retraining with kill -9, link rot, a takedown and a bad week; by rising noise that the champion takes out; approval by a person (8 min)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests/flows/test_retrain.py tests/flows/test_flywheel.py tests/flows/test_approval.py

test-restore: $(VENV)/.dev ## the root of `make up` copied, lost, and restored under another path (2 min)
	@$(PY) -m pytest -m slow tests/infra/test_restore.py

test-week: $(VENV)/.dev ## a week with `make up`: a yes, a schedule, new data, colleagues who delete, a lost machine, a move (8 min)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests/flows/test_week.py

test-slow: $(VENV)/.dev ## the slow tests that belong to none of the above: adopting, pulling, types between stages, rows in databases (6 min)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests/tasks/adopt tests/tasks/register tests/flows/test_adopted_recipe.py \
		tests/flows/test_database_rows.py tests/flows/test_types_where_stages_meet.py

$(VENV)/.spark: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline dev spark && touch $@ $(VENV)/.pipeline $(VENV)/.dev

test-spark: $(VENV)/.spark ## the merge on Spark gives DuckDB's rows; needs Java 17 (1 min)
	@$(PY) -m pytest tests/tasks/merge/test_spark.py

$(VENV)/.ray: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline dev ray && touch $@ $(VENV)/.pipeline $(VENV)/.dev

test-ray: $(VENV)/.ray ## a download by a Ray cluster, in a network of its own, ends as one by processes (3 min)
	@OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled RAY_ADDRESS=127.0.0.1:6379 unshare --map-root-user --net sh -c 'ip link set lo up && \
		$(VENV)/bin/ray start --head --node-ip-address=127.0.0.1 --num-cpus=2 --include-dashboard=false && \
		$(PY) -m pytest -m slow tests/tasks/download/test_spread.py -k ray; status=$$?; $(VENV)/bin/ray stop; exit $$status'

$(VENV)/.fuzz: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline dev fuzz && touch $@ $(VENV)/.pipeline $(VENV)/.dev

fuzz: $(VENV)/.fuzz ## FUZZ_SECONDS (600) of strangers' bytes for each boundary, guided by coverage; findings into fuzz-findings/ (80 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/fuzz/fuzz.py

ablation: $(VENV)/.pipeline ## the demo with one technique off at a time, as a table (15 min)
	@PYTHONPATH=. $(PY) tests/benchmarks/ablate_demo.py

bench: $(VENV)/.dev ## benchmarks; figures go to BENCHMARKS.md by hand
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; PYTHONPATH=. $(PY) $$file || exit 1; done

$(VENV)/.bench: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline dev bench && touch $@ $(VENV)/.pipeline $(VENV)/.dev

bench-merge: $(VENV)/.bench ## the merge at 5, 10 and 20 million rows beside plain SQL, polars and pandas (40 min, 10 GB)
	@PYTHONPATH=. $(PY) tests/benchmarks/bench_merge.py

bench-balance: $(VENV)/.bench ## a merge of 20 million rows without and with balancing, beside MetaCLIP's rule in plain Python; ROWS=5000000 for less (10 min of CPU, 8 GB)
	@PYTHONPATH=. $(PY) tests/benchmarks/bench_balance.py --rows $(or $(ROWS),20000000)

bench-adopt: $(VENV)/.dev ## shards adopted and verified beside webdataset alone reading them; SHARDS=1000 for the whole (1 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_adopt.py $(or $(SHARDS),20)

bench-trace: $(VENV)/.dev ## trace and takedown on an index of ten million samples (2 min, 3 GB)
	@PYTHONPATH=. $(PY) tests/benchmarks/bench_trace.py

bench-captions: $(VENV)/.dev ## further captions joined to an index; CAPTIONS=20000000 for 20 million (1 min, 0.4 GB a million)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_captions.py $(or $(CAPTIONS),1000000)

bench-dataset: $(VENV)/.dev ## dataset versions by thresholds, lists of uids and semantic duplicates among SAMPLES made-up samples (1,000,000: 10 min); WIDTH=0 for scores and uids alone
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_dataset.py $(or $(SAMPLES),1000000) $(or $(WIDTH),64)

bench-scale: $(VENV)/.dev ## the law of each data stage, at up to SHARDS (200000) shards and ROWS (20000000) rows; SHARDS=20000 ROWS=2000000 for a tenth (30 min of CPU, 6 GB, 8 GB of memory)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_scale.py --shards $(or $(SHARDS),200000) --rows $(or $(ROWS),20000000) $(if $(FOLDER),--folder $(FOLDER))

bench-find: $(VENV)/.dev ## find among SAMPLES (10000000) made-up features, exactly and by an index (1 h, 21 GB)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_find.py $(or $(SAMPLES),10000000)

bench-registry: $(VENV)/.dev ## a registered B/16 loaded, served and pulled where this project is not installed (3 min, 6 GB)
	@PYTHONPATH=. $(PY) tests/benchmarks/bench_registry.py

bench-loader: $(VENV)/.dev ## images read, decoded and cropped a second and core, beside open_clip's loader (10 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_loader.py

bench-train: $(VENV)/.dev ## whole training steps beside open_clip's trainer, memory of the loss, cost of saving (30 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_train.py

bench-loss: $(VENV)/.dev ## memory of the losses beside open_clip's sigmoid loss, traced at batches no machine here holds (1 min)
	@PYTHONPATH=. $(PY) tests/benchmarks/bench_loss.py

bench-tuning: $(VENV)/.dev ## a training step whole, with frozen blocks, with low-rank updates: time, memory, checkpoint (3 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) -m tests.benchmarks.bench_tuning

bench-model: $(VENV)/.dev ## speed and memory of model and tokenizer beside open_clip's (15 min)
	@PYTHONPATH=. $(PY) tests/benchmarks/bench_model.py
	@PYTHONPATH=. $(PY) tests/benchmarks/bench_tokenizer.py

dry-run-eval: $(VENV)/.dev ## all 33 sets of the paper with made-up images, through the command line to the report (4 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/dry_run_eval.py
	@$(PY) -m pytest -m slow tests/tasks/evaluate/test_report_page.py

check-gpu: $(VENV)/.dev ## what only a CUDA GPU shows, into runs/check-gpu: parity, kernels, fp16, Table 6, MFU
	@PYTHONPATH=. $(PY) tests/benchmarks/check_gpu.py runs/check-gpu

exactness: $(VENV)/.dev ## largest differences to timm and open_clip, and every checkpoint layout, as tables (1 min)
	@PYTHONPATH=. $(PY) tests/benchmarks/exactness.py
	@PYTHONPATH=. $(PY) tests/benchmarks/checkpoint_layouts.py

lamb-table: $(VENV)/.dev ## LAMB under ZeRO beside plain LAMB: naive and ours, every stage and precision, as a table (1 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/lamb_table.py

$(VENV)/.infra: $(STAMP)
	@python3 infra/environment.py $(VENV) pipeline dev infra && touch $@ $(VENV)/.pipeline $(VENV)/.dev

check-infra: $(VENV)/.infra ## infra/ against its validators and real PostgreSQL, S3, Slurm, Docker; as root, INSTALL=1 fetches them
	@PYTHONPATH=. $(PY) tests/infra/check_infra.py $(if $(INSTALL),--install)

test-root-url: $(VENV)/.infra ## the demo's pipeline with its root at a real S3 server, killed twice, finished by a machine with an empty disk (8 min)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests/flows/test_root_at_url.py

acceptance: $(VENV)/.dev ## 60,000 real pictures from URLs to figures, the same from every way of evaluating; needs two Debian packages (20 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/acceptance.py
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests/tasks/evaluate/test_ranks.py

finetune: $(VENV)/.dev ## a model of clothes tuned on digits, what it forgot, the gate's word on it and on weights between; needs a Debian package (10 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/finetune_pictures.py

bench-eval: $(VENV)/.dev ## text classifiers and a whole evaluation beside open_clip and clip_benchmark (20 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_eval.py

bench-probe: $(VENV)/.dev ## linear probe and kNN beside scikit-learn's and clip_benchmark's, on the same features (1 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_probe.py

bench-embed: $(VENV)/.dev ## features of shards a CPU second beside clip-retrieval's inference, where PEER=PYTHON has it; killed, two ranks: same bytes (20 min)
	@PYTHONPATH=. $(PY) tests/benchmarks/bench_embed.py --peer "$(PEER)"

bench-noise: $(VENV)/.dev ## what keep_share finds of shuffled captions, and what that is worth, three seeds; IMAGES=6000 SAMPLES=30208 for a tenth (2 h)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_noise.py --images $(or $(IMAGES),60000) --samples $(or $(SAMPLES),120064)

bench-objectives: $(VENV)/.dev ## what objectives, equal captions and a teacher are worth on Fashion-MNIST, three seeds; SAMPLES=15104 for an eighth (2 h)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/bench_objectives.py --samples $(or $(SAMPLES),120064)

interval-table: $(VENV)/.dev ## how often the intervals of figures hold the truth, by simulation, as the table of docs/evaluate.md (3 min)
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/benchmarks/interval_coverage.py

up: $(VENV)/.pipeline ## Prefect server and UI, MLflow, the search page, and workers with the deployments
	@$(PY) infra/up.py up

down: ## stop what `make up` started
	@$(PY) infra/up.py down

clean: ## remove the environment and everything the runs made
	rm -rf $(VENV) runs
