"""Functions that stop in the middle, hand something over, and go on with the answer.

They run in threads, but one at a time: whoever resumes one waits until it stops. So the order is
fixed and nothing runs at the same time; a thread is only the place where its stack waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any

import torch


class _Stopped(BaseException):
    """Unwinds a function that nobody will resume."""


class Coroutine:
    """A function that runs in a thread of `pool`, under the caller's settings of torch.

    Args:
        pool: with a free thread for every coroutine that is not done.
        function: called with this object when it is resumed for the first time.
    """

    def __init__(self, pool: ThreadPoolExecutor, function: Callable[[Coroutine], Any]) -> None:
        self.is_done = False
        self._started = False
        self._pool, self._function = pool, function
        self._answers: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._requests: SimpleQueue[tuple[bool, Any, BaseException | None]] = SimpleQueue()

    def resume(self, answer: Any = None) -> Any:
        """Let it run on, with `answer` from its `wait`; its next request, or what it returns."""
        if self._started:
            self._answers.put((True, answer))
        else:
            self._started = True
            self._pool.submit(self._run, settings())
        self.is_done, value, error = self._requests.get()
        if error is not None:
            try:
                raise error
            finally:
                del error  # it would hold this frame, and the frame it, with all tensors above
        return value

    def wait(self, request: Any) -> Any:
        """Inside of it: hand `request` over and stop until the next `resume`; its answer."""
        self._requests.put((False, request, None))
        goes_on, answer = self._answers.get()
        if not goes_on:
            raise _Stopped
        return answer

    def stop(self) -> None:
        """Unwind it where it waits, and wait for that."""
        if self._started and not self.is_done:
            self._answers.put((False, None))
            while not self.is_done:  # a `finally` of it may call a layer once more
                self.is_done, *_ = self._requests.get()
                if not self.is_done:
                    self._answers.put((False, None))

    def _run(self, entered: Callable[[], Any]) -> None:
        try:
            with entered():
                value = self._function(self)
        except BaseException as error:
            self._requests.put((True, None, error))
        else:
            self._requests.put((True, value, None))


def settings() -> Callable[[], Any]:
    """What torch keeps for each thread, as it is now here: a context that sets it elsewhere.

    Grad and inference mode, autocast, the hooks of saved tensors (offloading, checkpoints), modes
    of functions (`with torch.device(...)`), the default device and stream.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    modes = torch.overrides._get_current_function_mode_stack()
    cache = torch.is_autocast_cache_enabled()
    casts = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in ("cpu", "cuda")
    ]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, enabled in casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache))
            if hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*hooks))
            for mode in modes:
                stack.enter_context(mode)
            yield

    return entered
