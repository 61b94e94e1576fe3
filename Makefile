# Every target makes what it needs; nothing has to be installed by hand. `make PYTHON=/path/to/python3` picks one.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo demo-docker bench test test-user test-v2 check clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: ## .venv with the package and the tools of the tests
	@scripts/bootstrap

demo: venv ## what ROME did, first without our jail, then inside it; then a CSV analysed in a jail
	@.venv/bin/python examples/rome.py
	@.venv/bin/python examples/analyse_csv.py

demo-docker: venv ## what ROME did, with a Docker daemon of its own as the wall (root, docker.io)
	@.venv/bin/python examples/rome.py --launcher docker

bench: venv ## what a call costs here, beside other sandboxes (bench/install-peers installs some)
	.venv/bin/python bench/with-docker .venv/bin/sandbox bench --sustained 60 --alive 500 $(BENCH)
	.venv/bin/python bench/egress.py $(EGRESS_BENCH)

# More workers than a small machine has cores: half of their time tests wait. In the order of the files, which ends with the short ones.
SPREAD = -n 4 --dist loadscope --no-loadscope-reorder

test: venv ## all tests; as root also the user-mode ones as an ordinary user
	@scripts/need ssh-keygen git gcc make >/dev/null
	@scripts/need nsjail >/dev/null || echo "nsjail is missing: its tests are skipped, by name"
	.venv/bin/python -m pytest $(SPREAD) tests
	@if [ "$$(id -u)" = 0 ]; then $(MAKE) --no-print-directory test-user; fi

test-user: venv ## what depends on the uid of the kernel, escape and conformance tests, as an unprivileged one (needs root)
	scripts/as-user python -m pytest $(SPREAD) -m "not once" -p no:cacheprovider tests/kernel tests/escape tests/conformance/test_launchers.py

test-v2: venv ## the tests that depend on the kernel and its cgroups, on a cgroup v2 machine (qemu)
	scripts/test-v2

check: venv ## ruff, format, mypy, import directions
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -q tests/unit/test_imports.py

clean: ## remove caches and build results (.venv stays)
	rm -rf .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
