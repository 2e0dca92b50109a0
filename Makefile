# What one does here, by name. In a virtual environment: make setup, then the others.

.PHONY: setup fast check test bench launches ci

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

bench:       ## what planning costs here
	macs bench planner

launches:    ## what a plan launches on a GPU, counted without one
	macs bench launches

ci:          ## both supported Megatron versions, in fresh environments
	.ci/run
