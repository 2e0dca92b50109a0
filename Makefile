# What one does here, by name. In a virtual environment: make setup, then the others.

.PHONY: setup fast check test docs bench launches soak ci

setup:       ## everything, editable
	pip install -e '.[all]'

fast:        ## two minutes: no engine, no kernel, no program of its own
	pytest -m fast

check:       ## style and types
	ruff check .
	ruff format --check .
	mypy

test:        ## everything this machine can run
	pytest

docs:        ## the manual, in build/site; the table of settings anew
	python -m macs_tools.settings_page
	mkdocs build --strict

bench:       ## what planning costs here
	macs bench planner

launches:    ## what a plan launches on a GPU, counted without one
	macs bench launches

soak:        ## half an hour of two engines under traffic; needs Megatron-Core 0.18 or later
	python tests/soak.py --minutes 30

ci:          ## both supported Megatron versions, in fresh environments
	.ci/run
