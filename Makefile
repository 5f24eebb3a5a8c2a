# Everything goes through .venv, made on first use. `make help` lists the targets.
#
#   PYTHON=python3.12 make setup                 another interpreter (3.11 to 3.13)
#   TORCH="torch==2.11.0 --index-url URL" ...    another build of torch (a CPU wheel index, say)

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .clients
BROWSER := .browser
TOPOLOGY := .topology
TOOLS := .tools
CHROMIA := chromium chromium-browser google-chrome google-chrome-stable
HAS_CHROMIUM := { test -n "$$CHROME_PATH" $(foreach name,$(CHROMIA),|| command -v $(name)); } >/dev/null
LOCKED := --quiet --disable-pip-version-check --require-hashes --no-deps --requirement

.PHONY: help setup serve test docs browser clients topology peers bench gpu lint types check lock licences audit sbom lint-deploy hooks clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# torch comes alone: which build is right is this machine's business. All else is as it was locked, hashes and all.
$(VENV)/.runtime: pyproject.toml requirements/runtime.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11 to 3.13 is needed; this is $$($(PYTHON) --version). Try PYTHON=python3.12 make setup"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(LOCKED) requirements/runtime.txt
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.txt
	$(BIN)/python -m pip install $(LOCKED) requirements/dev.txt
	@touch $@

setup: $(VENV)/.runtime ## make .venv with all that serving needs

serve: setup ## serve the bundled checkpoint on port 8000; make serve ARGS="--port 8001"
	$(BIN)/python -m server $(ARGS)

test: $(VENV)/.dev ## run the tests; make test ARGS="-k scheduler"
	$(BIN)/python -m pytest $(ARGS)

browser: $(VENV)/.browser $(BROWSER)/.done ## the playground in Chromium with a fake microphone; needs chromium
	@$(HAS_CHROMIUM) || { echo "Chromium is needed: apt-get install chromium, or name one in CHROME_PATH"; exit 1; }
	$(BIN)/python -m pytest tests/browser -m browser $(ARGS)

$(VENV)/.browser: $(VENV)/.dev tests/browser/python.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement tests/browser/python.txt
	@touch $@

$(BROWSER)/.done: tests/browser/package.json tests/browser/node.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/browser/node.txt
	cp $< $(@D) && PATH="$(abspath $(@D))/bin:$$PATH" npm install --prefix $(@D) --silent --no-audit --no-fund
	@touch $@

clients: $(VENV)/.dev $(CLIENTS)/openai3/.done $(CLIENTS)/openai2/.done $(CLIENTS)/node/.done ## run real clients against a server
	$(BIN)/python -m pytest tests/clients -m clients $(ARGS)

$(CLIENTS)/%/.done: tests/clients/%.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(CLIENTS)/node/.done: tests/clients/package.json tests/clients/node.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/clients/node.txt
	cp $< $(@D) && PATH="$(abspath $(@D))/bin:$$PATH" npm install --prefix $(@D) --silent --no-audit --no-fund
	@touch $@

topology: $(VENV)/.dev $(TOPOLOGY)/.done ## replicas behind nginx and smg, restarted and killed under load; needs nginx
	$(BIN)/python -m pytest tests/deploy -m topology $(ARGS)

$(TOPOLOGY)/.done: tests/deploy/requirements.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

peers: setup ## install vLLM's CPU build in .peers, for bench to measure beside
	$(BIN)/python -m benchmarks.peers.install_vllm $(ARGS)

bench: $(VENV)/.dev ## the CPU benchmarks, within 15 minutes: JSON and a picture
	$(BIN)/python -m benchmarks.cpu_set $(ARGS)

gpu: $(VENV)/.dev ## on a machine with a GPU: the tests that need one, then every benchmark (docs/gpu.md)
	@$(BIN)/python -m benchmarks.gpu all --plan $(ARGS)
	@echo "before them, the tests that need a GPU, for which every kernel is compiled: how long is unmeasured"
	@$(BIN)/python -m pytest -m gpu; tests=$$?; $(BIN)/python -m benchmarks.gpu all $(ARGS) && exit $$tests

docs: $(VENV)/.dev ## build the documentation in site/, its links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

check: lint types docs test clients lint-deploy sbom ## all that CI runs: the code, the playground, what is shipped
	$(TOOLS)/bin/python -m tools.licences --check
	$(TOOLS)/bin/python -m tools.audit --or-say-so
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(TOOLS)/bin/pre-commit run --all-files; \
		else echo "the hooks of .pre-commit-config.yaml are NOT RUN: this is no git repository"; fi
	@if $(HAS_CHROMIUM); then $(MAKE) browser; else echo "the playground is NOT TRIED: Chromium is missing"; fi

# What tools/ runs on.
$(TOOLS)/.done: requirements/tools.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install $(LOCKED) $<
	@touch $@

lock: $(TOOLS)/.done ## lock what pyproject.toml asks for; make lock ARGS=--upgrade
	$(TOOLS)/bin/python -m tools.lock "$(firstword $(TORCH))" $(ARGS)

licences: $(TOOLS)/.done ## write THIRD_PARTY.md; an unknown licence fails; make licences ARGS=--check only compares
	$(TOOLS)/bin/python -m tools.licences $(ARGS)

audit: $(TOOLS)/.done ## known vulnerabilities of what is locked; make audit ARGS=--or-say-so where there is no database
	$(TOOLS)/bin/python -m tools.audit $(ARGS)

sbom: $(TOOLS)/.done ## a CycloneDX bill of materials, dist/sbom.cdx.json
	$(TOOLS)/bin/python -m tools.sbom

lint-deploy: $(TOOLS)/.done ## lint the image, compose files, manifests, nginx and CI's files
	$(TOOLS)/bin/python -m tools.deployment

hooks: $(VENV)/.dev $(TOOLS)/.done ## quick checks at every commit
	$(TOOLS)/bin/pre-commit install

clean: ## remove .venv and caches
	rm -rf $(VENV) $(BROWSER) $(CLIENTS) $(TOPOLOGY) $(TOOLS) .peers build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
