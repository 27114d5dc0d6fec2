# Set-up, demo, tests and checks. `make demo` on a fresh clone does everything; a second call installs nothing.
# The environment is made once in .venv and brought up to date when one of the files in INPUTS changes in content.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3 python,\
	$(shell $(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints-cpu.txt $(wildcard pipeline/setup/*.py)
STAMP := $(VENV)/.ready-$(shell cat $(INPUTS) | cksum | cut -d' ' -f1)

# The extra of `vans serve`, which the tests try and the demo does not need.
SERVE := $(VENV)/.serve-$(shell cat $(INPUTS) constraints-serve.txt | cksum | cut -d' ' -f1)

export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
# Where byte code may not be written, every worker would compile the libraries anew, each taking some ten seconds more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-fast chaos chaos-share bench check docs screenshots site clean

help:
	@echo "make demo    install what is needed, then align the tiny pair with Joint-GRPO (runs/demo)"
	@echo "make test    install what is needed, then run the test suite"
	@echo "make test-fast  the tests that start no Ray and no vLLM and take no seconds: for people who edit"
	@echo "make chaos   the long tests of faults and exact resume, then twenty minutes of random faults"
	@echo "make chaos-share   fifteen minutes of those tests, others at every commit"
	@echo "make bench   measure every claim of speed against its baseline, and write docs/results/benchmarks.md"
	@echo "make check   lint, formatting, types, import layering and the documentation site"
	@echo "make docs    write what in docs/ and cluster/manifests/examples comes from the code"
	@echo "make screenshots  the pages' pictures in docs/images, of runs/demo; needs Chromium"
	@echo "make site    build the documentation site into site/, and say how to read it"
	@echo "make setup   install only"
	@echo "make clean   remove .venv, caches and runs/demo"

setup: $(STAMP)

# The constraints name every distribution, so pip installs them without resolving. The wheels in UNUSED are left out:
# nothing here calls them, two of them do not load beside a CPU build of torch, the third is a gigabyte, and the fourth is
# imported by transformers wherever it lies, which costs every worker's start two seconds.
# pip would compile tens of thousands of files to byte code one by one; warm_up.py compiles those that are imported.
UNUSED := torchaudio|torchcodec|triton|scikit-learn
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV) with $$($(PYTHON) --version): about two minutes and 4 GB, once"
	@start=$$(date +%s) && rm -f $(VENV)/.ready-* \
	&& { test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); } \
	&& grep -vE '^($(UNUSED))==' constraints-cpu.txt > $(VENV)/requirements.txt \
	&& $(PIP) install --no-compile --no-deps -r $(VENV)/requirements.txt \
	&& $(PIP) install --no-compile --no-deps --no-build-isolation -e . \
	&& $(BIN)/python pipeline/setup/torchvision_hook.py \
	&& $(BIN)/python pipeline/setup/warm_up.py \
	&& echo $$(( $$(date +%s) - start )) > $(VENV)/install_seconds \
	&& touch $@ \
	&& echo "Installed in $$(cat $(VENV)/install_seconds) s; \`$(BIN)/vans doctor\` says what works"

$(SERVE): $(STAMP)
	@rm -f $(VENV)/.serve-* && $(PIP) install --no-compile --no-deps -r constraints-serve.txt && touch $@

demo: setup
	$(BIN)/vans demo

# The files are shared by two processes side by side, each with a Ray of its own; LANES=0 is one process, for less memory.
LANES ?= 2
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: setup $(SERVE)
	$(PYTEST) -n $(LANES)

test-fast: setup $(SERVE)
	$(PYTEST) -n 2 -m "not (ray or vllm or slow or chaos or gpu)"

# The tests that take longer than 20 seconds each, and 20 minutes of random faults.
chaos: setup $(SERVE)
	$(BIN)/python -m pytest -m chaos
	rm -rf runs/chaos && $(BIN)/python tests/chaos/soak.py --minutes 20 --seed 0 --out runs/chaos

# Fifteen minutes of them, others at every commit.
chaos-share: setup $(SERVE)
	$(BIN)/python -m tests.chaos.share --minutes 15

# Each row in a process of its own, beside its baseline. Nothing else should run on the machine meanwhile.
bench: setup
	$(BIN)/python -m tests.benchmarks.run --out docs/results

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(SITE)

docs: setup
	$(BIN)/python -W ignore -m pipeline.tracking.metrics > docs/metrics.md
	$(BIN)/python -W ignore -m pipeline.config.reference > docs/configuration.md
	$(BIN)/python -W ignore -m pipeline.commands.manifests
	$(BIN)/python -W ignore -m pipeline.plan.document docs/placement.md
	$(BIN)/python -W ignore -m typer pipeline.cli utils docs --name vans --title Commands --output docs/commands.md
	$(BIN)/python -W ignore -m pipeline.data.toy.picture docs/images/toy_world.mp4

screenshots: setup $(SERVE)
	$(BIN)/python -m tests.screenshots

# A dead link, a page that is not in the menu or a name that is not in the code ends it.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

site: setup
	$(SITE)
	@echo "The documentation is in site/; to read it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8000"

clean:
	rm -rf $(VENV) runs/demo site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis *.egg-info
