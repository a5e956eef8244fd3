# One command each; all of them install what they need first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CUDA's build of the engine where there is an NVIDIA GPU, else the CPU's. `make VARIANT=cpu` decides.
VARIANT ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
LOCKS := requirements/$(VARIANT).txt requirements/dev.txt $(wildcard requirements/torch-$(VARIANT).txt)
STAMP := $(VENV)/installed-$(VARIANT)
ARGS ?=
# Podman builds and runs the image as well.
CONTAINER_ENGINE ?= docker

.PHONY: install demo serve test check bench demo-model image litellm lock clean

install: $(STAMP)

$(STAMP): $(LOCKS) pyproject.toml requirements/install.sh
	requirements/install.sh "$(PYTHON)" "$(VENV)" "$(VARIANT)"
	@touch $@

demo: install  ## the demo model for three users, on 127.0.0.1:8000
	$(BIN)/expertgate demo $(ARGS)

serve: install  ## ARGS="MODEL --config expertgate.yaml"
	$(BIN)/expertgate serve $(ARGS)

# Two at a time: tests wait for servers as often as they compute. The tests of a file share theirs.
test: install  ## ARGS="-k name" runs some, ARGS="-n 0" one at a time
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: install  ## edits nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py

bench: install  ## beside what people have today, on this machine; ARGS="--help" says what
	$(BIN)/python -m benchmarks.throughput $(ARGS)

image:  ## expertgate:cuda or expertgate:cpu; ARGS="--build-arg PYTHON_IMAGE=python@sha256:..."
	$(CONTAINER_ENGINE) build --build-arg VARIANT=$(VARIANT) \
	  --build-arg REVISION=$$(git describe --always --dirty --abbrev=40) --tag expertgate:$(VARIANT) $(ARGS) .

litellm: build/litellm/installed  ## LiteLLM's proxy, in an environment of its own, for its test

build/litellm/installed: requirements/litellm.txt
	"$(PYTHON)" -m venv build/litellm
	build/litellm/bin/pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r $<
	@touch $@

demo-model: install  ## trains the demo model anew, as its card tells; under 30 minutes, into build/demo
	$(BIN)/python -m expertgate.forge.demo --out build/demo $(ARGS)

lock: install  ## pins requirements/*.txt anew
	$(BIN)/python requirements/lock.py

clean:
	rm -rf $(VENV)
