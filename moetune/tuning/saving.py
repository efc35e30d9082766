"""Saves what a tune measures. What cannot be saved costs no measurement: it is kept until the end of the tune."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

from moetune.errors import DamagedProfileError, MoetuneError, NotSavedError, StoreError, UsageError
from moetune.spec.tactic import Tactic
from moetune.store.journal import Journal, Searched
from moetune.store.profile import Choice, Profile
from moetune.tuning.events import NotJournaled, NotSaved, OnEvent
from moetune.tuning.question import Question
from moetune.tuning.uninterrupted import uninterrupted


class Notes:
    """The journal of a running tune. If it cannot be written, this is reported, and the tune goes on without it.

    Args:
        journal: the journal.
        report: gets the event.
    """

    def __init__(self, journal: Journal, report: OnEvent) -> None:
        self.journal, self._report, self._failed = journal, report, False

    def note(
        self, rows: int, strategy: str, rounds: int, times_us: Mapping[Tactic, float], failed: Mapping[Tactic, str]
    ) -> None:
        """Appends a measured batch of one bucket; the arguments are those of `Journal.note`."""
        if not self._failed:
            try:
                self.journal.note(rows, strategy, rounds, times_us, failed)
            except (StoreError, UsageError) as error:
                self._end(error)

    def note_search(self, search: Searched) -> None:
        """Appends what a search begins with, or has ended with."""
        if not self._failed:
            try:
                self.journal.note_search(search)
            except (StoreError, UsageError) as error:
                self._end(error)

    def drop(self, buckets: Collection[int]) -> None:
        """Drops the measurements of some buckets."""
        try:
            self.journal.drop(buckets)
        except (StoreError, UsageError) as error:
            self._end(error)

    def _end(self, error: MoetuneError) -> None:
        """Notes nothing any more: each attempt may wait for a lock, and a gap ends what a later run can go on from."""
        self._failed = True
        self._report(NotJournaled(error.message))


class Saver:
    """Saves the choices of a tune. Those that cannot be saved are saved with the next one, or raised at the end.

    If the store's folder vanishes meanwhile, the choices that were saved before are saved again.

    Args:
        question: the question that is tuned.
        stored: the profile that has the other buckets, if there is one.
        replacing: the choices replace what is stored for their buckets, whenever that was measured.
        report: gets the events.
    """

    def __init__(self, question: Question, stored: Profile | None, replacing: bool, report: OnEvent) -> None:
        self._question, self._replacing, self._report = question, replacing, report
        self._journal = question.journal()
        self._stored, self._unsaved, self._saved = stored, list[Choice](), dict[int, Choice]()
        self._error: MoetuneError | None = None

    def save(self, choice: Choice) -> None:
        """Saves one more choice, and those before it that could not be saved.

        Raises:
            DamagedProfileError: the file was damaged meanwhile, and was moved aside. Everything is saved.
        """
        self._unsaved.append(choice)
        self._attempt()
        if self._error is not None:
            self._report(NotSaved(choice.rows, self._error.message))

    def finish(self) -> Profile:
        """Returns the whole profile.

        Raises:
            NotSavedError: some choices could not be saved, now neither.
        """
        if self._unsaved:
            self._attempt()
        self.raise_unsaved()
        assert self._stored is not None
        return self._stored

    def raise_unsaved(self) -> None:
        """Raises `NotSavedError` if some choices are not saved."""
        if self._error is not None:
            rows = tuple(choice.rows for choice in self._unsaved)
            measured = self._question.profile(*self._unsaved)
            answer = self._stored.merged(measured, replacing=self._replacing) if self._stored else measured
            raise NotSavedError(
                f"What was measured is not saved, at {', '.join(map(str, rows))} rows. {self._error.message}",
                f"{self._error.hint} Then run the same command again. This result is printed.".lstrip(),
                answer,
                {self._question.backend.name: rows},
            )

    def _attempt(self) -> None:
        self._error = None
        with uninterrupted():
            try:
                self._store_unsaved()
                if self._unsaved:
                    self._store_unsaved()
            except DamagedProfileError:
                self._unsaved.clear()
                raise
            except (StoreError, UsageError) as error:
                self._error = error
                return
            with suppress(MoetuneError):  # what stays in the journal is of no use, and does no harm
                self._journal.drop(self._rows())

    def _store_unsaved(self) -> None:
        """Stores the choices that are not saved. Those that were and have vanished are not saved any more."""
        profile = self._question.profile(*self._unsaved)
        self._stored = self._question.store.save(profile, replacing=self._replacing)
        self._saved |= {choice.rows: choice for choice in self._unsaved}
        self._unsaved = [choice for choice in self._saved.values() if choice.rows not in self._rows()]

    def _rows(self) -> set[int]:
        """Returns the buckets that are stored."""
        return {choice.rows for choice in self._stored.choices} if self._stored else set()
