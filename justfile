# One verb per need; `just` lists them.
venv := ".venv/bin/"

default:
    @just --list

# what CI runs, from a fresh virtual environment
ci:
    bash .ci/run

# the test suite, under ten minutes on two cores
test *ARGS:
    {{venv}}pytest {{ARGS}}

# the tests that take minutes each (random kills, concept scores)
slow:
    {{venv}}pytest -m slow

# every test of crash safety, with its figures (tests/crash/README.md); as root it cuts the power of a file system, too
crash *ARGS:
    {{venv}}pytest tests/crash -s -m "slow or not slow" {{ARGS}}

# mistakes that the tests must notice (tests/mutants.toml), each tried on a copy; not part of CI
mutants *ARGS:
    {{venv}}python tools/mutants.py {{ARGS}}

# mistakes made by rules, so many for each of a few files: which ones no test notices (tools/mistakes.py); a quarter of an hour
mutants-sample *ARGS:
    {{venv}}python tools/mutants.py --sample 12 {{ARGS}}

# how far real runs come apart from the oracle, an independent trainer: a Markdown table (three minutes)
oracle *ARGS:
    {{venv}}python tools/oracle_table.py {{ARGS}}

# check style, format, imports between packages, declared dependencies and types; changes nothing
lint:
    {{venv}}ruff check .
    {{venv}}ruff format --check .
    {{venv}}lint-imports
    {{venv}}deptry runner
    {{venv}}mypy

# fix what ruff can fix, and format
fmt:
    {{venv}}ruff check --fix .
    {{venv}}ruff format .

# write docs/keys.md, the key reference, from the spec's models
keys:
    {{venv}}python tools/key_reference.py

# train the bundled base again, from nothing (about two hours on two cores)
tiny-base:
    {{venv}}python tools/make_tiny_base.py --out runner/bases/tiny

# how well the bundled base follows captions
check-base:
    {{venv}}python tools/check_tiny_base.py

# all benchmarks but those against the reference (45 minutes on an otherwise idle machine; tools/bench/README.md)
bench:
    {{venv}}python tools/bench/step.py
    {{venv}}python tools/bench/memory.py
    {{venv}}python tools/bench/lora_memory.py
    {{venv}}python tools/bench/startup.py
    {{venv}}python tools/bench/growth.py

# whole runs against diffusers' train_dreambooth_lora_flux_advanced.py, which SCRIPT names (an hour)
bench-reference SCRIPT *ARGS:
    {{venv}}python tools/bench/against_reference.py --script {{SCRIPT}} {{ARGS}}

# one short run per combination of what learns, prior, optimizer and dtype (minutes)
matrix:
    {{venv}}python tools/matrix.py

# what each way of training makes of the quickstart's creature (20 minutes)
concepts:
    {{venv}}python tools/concept_table.py
