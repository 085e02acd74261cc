"""Several processes on one run: who does what, where they wait for each other, and for how long.

Every rank does its share of the costly work and gets everybody's results; the main one alone decides and writes. What
one rank decides or fails at ends or turns all of them. Host-side exchange goes over gloo, whatever moves gradients.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.distributed_c10d import _get_default_store

from dfu_mlflow.errors import Interrupted, UserError
from dfu_mlflow.interrupt import StopRequest
from dfu_mlflow.ranks.board import SILENT_S, Board

POLL_S = 0.02
Answer = TypeVar("Answer")


class RankLost(UserError):
    """Another rank is dead, stuck or has failed; says which."""


class Ranks:
    """The processes of a run, seen from one of them. Made without arguments it is the only one.

    Args:
        check: asked between batches; raises `Interrupted` where this process is to stop.
        board: where ranks leave word; None for one process.
        timeout_s: how long a rank is waited for.
    """

    def __init__(
        self, check: Callable[[], None] | None = None, board: Board | None = None, timeout_s: float = 600.0
    ) -> None:
        self.check = check or (lambda: None)
        self.index = 0 if board is None else board.index
        self.count = 1 if board is None else board.count
        self.timeout_s = timeout_s
        self._board = board
        self._group: Any = None
        if board is not None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @property
    def main(self) -> bool:
        """Is this the rank that decides and writes?"""
        return self.index == 0

    def at(self, place: str) -> None:
        """Say where this rank is, for the message when another does not come."""
        if self._board is not None:
            self._board.at(place)

    def meet(self, place: str, limited: bool = True) -> None:
        """Wait until every rank is here.

        Args:
            limited: for `timeout_s` at most; else as long as the others live.

        Raises:
            RankLost: naming who did not come.
            Interrupted: where another rank, or this one, was asked to stop.
        """
        if self._board is None:
            return
        self._board.arrive(place)
        started = time.monotonic()
        watch = _Watch(self._board)
        while missing := self._board.missing(range(self.count)):
            self._hear()
            dead = watch.dead(missing, self.asked_to_stop())
            if dead:
                raise RankLost(self._ended(dead))
            if limited and time.monotonic() - started > self.timeout_s:
                raise RankLost(f"{self._named(missing)} did not arrive at {place} within {self.timeout_s:g} s")
            if time.monotonic() - started > 2 * SILENT_S:
                self.check()  # not sooner: a launcher's SIGTERM means that another rank has ended, and which is told
            time.sleep(POLL_S)

    def everyone(self, value: Answer, place: str) -> list[Answer]:
        """The value of each rank, by rank."""
        if self._board is None:
            return [value]
        self.meet(place)
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def rows(self, count: int, size: int, compute: Callable[[slice], torch.Tensor], place: str) -> torch.Tensor:
        """Compute `count` rows, shared out among the ranks in chunks of `size`; every rank gets all of them.

        Chunks are the same however many ranks there are, so that the rows are too, to the bit.
        """
        mine = {
            start: compute(slice(start, min(start + size, count)))
            for number, start in enumerate(range(0, max(count, 1), size))
            if number % self.count == self.index
        }
        found = {start: rows for part in self.everyone(mine, place) for start, rows in part.items()}
        return torch.cat([found[start] for start in sorted(found)])

    def decided(self, decide: Callable[[], Answer], place: str, limited: bool = True) -> Answer:
        """What the main rank decides; the others wait for its answer, or for the error it ends with."""
        if self._board is None:
            return decide()
        answer: list[Any] = [decide() if self.main else None]
        self.meet(place, limited)
        dist.broadcast_object_list(answer, src=0, group=self._group)
        decision: Answer = answer[0]
        return decision

    @contextmanager
    def main_first(self, place: str) -> Iterator[None]:
        """The main rank runs the block before the others do, who then find in caches what it has stored.

        However long it takes: photographs are encoded here. All leave together.
        """
        if not self.main:
            self.meet(f"{place} by the main rank", limited=False)
        yield
        if self.main:
            self.meet(f"{place} by the main rank", limited=False)
        self.meet(place, limited=False)

    def mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures averaged over the ranks."""
        if self._board is None:
            return dict(figures)
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        dist.all_reduce(values, group=self._group)
        return dict(zip(figures, (values / self.count).tolist(), strict=True))

    def any(self, asked: bool) -> bool:
        """Does any rank say yes?"""
        return asked if self._board is None else self.mean({"asked": float(asked)})["asked"] > 0

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Errors of a collective, which say that somebody is missing, become `RankLost`, which says who."""
        try:
            yield
        except (RuntimeError, Interrupted) as error:
            if self._board is None or (isinstance(error, RuntimeError) and _is_own(error)):
                raise
            try:
                self._explain(error)
            except dist.DistNetworkError:  # without a launcher the store dies with rank 0
                raise RankLost(f"{self._named([0])} has ended, see its own message") from error

    def _explain(self, error: Exception) -> NoReturn:
        assert self._board is not None
        late = self._board.seconds_here() >= self.timeout_s  # else nobody was waited for that long
        self._hear()
        if dead := self._board.silent():
            raise RankLost(self._ended(dead)) from error
        self._hear()
        if late and isinstance(error, RuntimeError) and (behind := self._board.behind()):
            place = self._board.place
            raise RankLost(f"{self._named(behind)} did not arrive at {place} within {self.timeout_s:g} s") from error
        raise error

    def asked_to_stop(self) -> bool:
        """Has this process been asked to stop?"""
        try:
            self.check()
        except Interrupted:
            return True
        return False

    def _hear(self) -> None:
        """End as another rank has ended."""
        assert self._board is not None
        word = self._board.left()
        if word is None:
            return
        rank, why = word
        if why["kind"] == Interrupted.__name__:
            raise Interrupted(why["message"])
        told = why["message"] if why["kind"] == RankLost.__name__ else f"{self._named([rank])} failed: {why['message']}"
        raise RankLost(told)

    def _ended(self, ranks: list[int]) -> str:
        assert self._board is not None
        last = self._board.beat_of(ranks[0]).place
        return f"{self._named(ranks)} ended without a word (killed, or out of memory); last seen at {last}"

    def _named(self, ranks: list[int]) -> str:
        listed = ", ".join(map(str, ranks))
        return f"rank{'s' if len(ranks) > 1 else ''} {listed} of {self.count}"


class _Watch:
    """Tells the dead from the late while a rank waits."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.seen: dict[int, tuple[int, float]] = {}

    def dead(self, ranks: list[int], alarmed: bool) -> list[int]:
        """Ranks without a sign of life; sooner where something is known to be wrong, such as a launcher's SIGTERM."""
        now, patience = time.monotonic(), SILENT_S if alarmed else 3 * SILENT_S
        gone = []
        for rank in ranks:
            number = self.board.beat_of(rank).number
            if self.seen.get(rank, (-1, 0.0))[0] != number:
                self.seen[rank] = (number, now)
            elif now - self.seen[rank][1] > patience:
                gone.append(rank)
        return gone


def is_main_process() -> bool:
    """Is this process the only one, or rank 0 of those that a launcher started?"""
    return int(os.environ.get("RANK", "0")) == 0


def uses_deepspeed() -> bool:
    """Has the launcher asked for DeepSpeed?"""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def uses_fsdp() -> bool:
    """Has the launcher asked for FSDP?"""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def joined(device: torch.device, timeout_s: float, stop: StopRequest) -> Iterator[Ranks]:
    """Join the other processes that a launcher (accelerate, torchrun) has started; without one be the only rank.

    Leaving the block with an error tells the others why; leaving it without one waits for them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks(stop.check)
        return
    state = _open_group(device, timeout_s)
    board = Board(_get_default_store(), state.process_index, state.num_processes)
    try:
        ranks = Ranks(stop.check, board, timeout_s)
        yield ranks
        ranks.meet("the end", limited=False)
    except BaseException as error:
        kind = next(kind for kind in (RankLost, Interrupted, BaseException) if isinstance(error, kind))
        message = " ".join(str(error).split()) or type(error).__name__
        board.leave(
            kind.__name__,
            message if isinstance(error, UserError | Interrupted) else f"{type(error).__name__}: {message}",
        )
        raise
    finally:
        board.close()
    dist.barrier(group=ranks._group)
    state.destroy_process_group()


def _open_group(device: torch.device, timeout_s: float) -> PartialState:
    """accelerate's process group, with gloo on the CPU, where DeepSpeed would ask for oneCCL."""
    limit = {"timeout": timedelta(seconds=timeout_s)}
    if device.type != "cpu":
        return PartialState(**limit)
    deepspeed = uses_deepspeed()
    if deepspeed:
        from deepspeed import ops

        # Else DeepSpeed compiles C++ for a minute in every rank, to exchange over shared memory what gloo can too.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return PartialState(cpu=not deepspeed, backend="gloo", **limit)


def _is_own(error: RuntimeError) -> bool:
    """Out of memory is this rank's own error."""
    return isinstance(error, torch.OutOfMemoryError)
