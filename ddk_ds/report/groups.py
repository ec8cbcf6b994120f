"""Runs that belong together: seeds of one configuration, and those whose perplexities may be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddk_ds.drawing import Array
from ddk_ds.report.records import RunRecord

_SEED = re.compile(r"-s\d+$")
_OF_EARLIER_STAGES = {"content.filters", "content.schedule", "mixture.schedule_file", "content.init_from"}
_SAME = 1e-3
"""Relative difference below which two measurements of one model count as equal: other ranks round differently."""


@dataclass(frozen=True)
class Group:
    """One run, or several that differ in their seed alone."""

    label: str
    number: int
    """Place among the groups of the page, from 0: its colour."""
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        """Return the run of the first seed."""
        return self.runs[0]

    @property
    def key(self) -> str:
        """Return the name by which the page's legends switch the group."""
        return f"run:{self.label}"

    @property
    def title(self) -> str:
        """Return the label, with the number of seeds where there are several."""
        return self.label if len(self.runs) == 1 else f"{self.label} ({len(self.runs)} seeds)"

    @property
    def when(self) -> str:
        """Return "after" for finished runs, else the step of the last measurement."""
        unfinished = [run for run in self.runs if run.summary is None]
        return f"at step {unfinished[0].measurements[-1]['step']:,}" if unfinished else "after"

    def values(self, key: str, domains: Sequence[str]) -> Array:
        """Return a field of `DomainResult` (K, N) for K seeds and the domains; NaN where a run has none."""
        by_run = [{result.name: getattr(result, key) for result in run.results} for run in self.runs]
        return np.array([[by_name.get(name) for name in domains] for by_name in by_run], np.float64)

    def scores(self, key: str, teacher_ppl: Array | None, domains: Sequence[str]) -> Array:
        """Return for each seed (K,) one number over all domains of a field of perplexities, `before` or `after`.

        It is the mean ratio to the teacher's perplexities (N,), or without a teacher the geometric mean.
        """
        values = self.values(key, domains)
        ratios = np.exp(np.log(values).mean(1)) if teacher_ppl is None else (values / teacher_ppl).mean(1)
        return np.asarray(ratios, np.float64)


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Put runs that differ in their seed alone into one group; groups are in the order of their first runs."""
    found: dict[str, list[list[RunRecord]]] = {}
    for run in runs:
        alike = found.setdefault(_all_but_the_seed(run), [[]])
        if run.identity is not None and any(_seed(run) == _seed(other) for other in alike[-1]):
            alike.append([])  # the same run twice is no second seed
        alike[-1].append(run)
    members = [alike for same in found.values() for alike in same]
    places = {id(run): place for place, run in enumerate(runs)}
    members.sort(key=lambda alike: places[id(alike[0])])
    return [Group(_label(alike), number, tuple(alike)) for number, alike in enumerate(members)]


def _seed(run: RunRecord) -> Any:
    return None if run.identity is None else run.identity.get("seed")


def _all_but_the_seed(run: RunRecord) -> str:
    if run.identity is None:
        return str(run.run_dir)
    left_out = {"seed"}
    name = run.run_dir.resolve().name
    named = _SEED.search(name)
    if named is not None and named[0] == f"-s{_seed(run)}":  # a comparison's: each seed has earlier stages of its own
        left_out |= _OF_EARLIER_STAGES
    known = {key: value for key, value in run.identity.items() if key not in left_out}
    return repr((_SEED.sub("", name) if len(left_out) > 1 else "", sorted(known.items())))


def _label(runs: Sequence[RunRecord]) -> str:
    labels = {_SEED.sub("", run.run_dir.resolve().name) for run in runs}
    if len(runs) == 1:
        return runs[0].name
    return labels.pop() if len(labels) == 1 else f"{runs[0].name} and other seeds"


def comparable_sets(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups in sets within which perplexities may be compared; the first has the first group."""
    sets: list[list[Group]] = []
    for group in groups:
        home = next((others for others in sets if not objections(group, others[0])), None)
        if home is None:
            sets.append([group])
        else:
            home.append(group)
    return sets


def objections(group: Group, other: Group) -> list[str]:
    """Return why the perplexities of two groups must not be compared; empty if they were measured on the same."""
    ours, theirs = group.first.identity, other.first.identity
    if ours is None or theirs is None:
        without = group if ours is None else other
        return [f"{without.label} has no run.json, which says on what it was measured"]
    found = []
    for key, text in (
        ("data.validation_samples", "{ours} held-out samples of each domain, {theirs} for {label}"),
        ("data.sequence_length", "sequences of {ours} tokens, {theirs} for {label}"),
    ):
        if ours.get(key) != theirs.get(key):
            found.append(text.format(ours=ours.get(key), theirs=theirs.get(key), label=other.label))
    apart, of_other = (identity.get("content.documents") or "joined" for identity in (ours, theirs))
    if apart != of_other:
        found.append(f"{apart} documents, {of_other} ones for {other.label} (data.documents)")
    if ours.get("content.tokenizer") != theirs.get("content.tokenizer"):
        found.append(f"another tokenizer than {other.label}: a perplexity per token means something else")
    common = [name for name in group.first.domains if name in other.first.domains]
    differing = [name for name in common if _held_out(ours, name) != _held_out(theirs, name)]
    if not common:
        found.append(f"no domain in common with {other.label}")
    if differing:
        found.append(f"other held-out texts than {other.label} in {', '.join(differing)}")
    return found


def _held_out(identity: dict[str, Any], domain: str) -> str:
    return str(identity.get(f"content.domains.{domain}")).rpartition("/")[2]


def remarks(groups: Sequence[Group]) -> list[str]:
    """Return what else differs between comparable groups and their first: start, teacher, domains, tokens."""
    found = []
    reference = groups[0]
    for group in groups[1:]:
        common = [name for name in reference.first.domains if name in group.first.domains]
        if set(group.first.domains) != set(reference.first.domains):
            found.append(f"{group.label} has other domains than {reference.label}: only those of both are compared.")
        if _differ(group, reference, "before", common):
            found.append(f"{group.label} started from another student than {reference.label}.")
        if group.first.has_teacher and reference.first.has_teacher and _differ(group, reference, "teacher_ppl", common):
            found.append(
                f"{group.label} had another teacher than {reference.label}; in the table its ratio is to the teacher "
                f"of {reference.label}."
            )
        ours, theirs = (np.mean([run.domain_tokens.sum() for run in each.runs]) for each in (group, reference))
        if abs(ours - theirs) > 0.01 * theirs:
            found.append(f"{group.label} was trained on {ours:,.0f} tokens, {reference.label} on {theirs:,.0f}.")
    return found


def _differ(group: Group, reference: Group, key: str, domains: Sequence[str]) -> bool:
    ours, theirs = (np.nanmean(each.values(key, domains), 0) for each in (group, reference))
    return bool((np.abs(ours - theirs) > _SAME * theirs).any())
