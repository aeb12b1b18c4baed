"""Finds stop strings in text that arrives in pieces, and holds back no more than it must."""

from __future__ import annotations

import functools
from collections import deque


class StopStrings:
    """Ends a text where the first of `stop` is complete.

    Where several strings end at the same character, the longest counts, so that none of it shows. It does not matter
    how the text is cut into pieces. Characters are code points.

    This is an Aho-Corasick automaton. Its state is the longest end of the text so far with which some stop string
    begins, which is exactly what has to be held back. Each character costs amortised constant time, however many
    strings there are.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._automaton = _automaton(stop) if stop else None
        self._state = 0
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Takes the next piece. Returns the text that can go out, and whether a stop string was found.

        What comes after a stop string is ignored.
        """
        if self._stopped:
            return "", True
        if self._automaton is None:
            return text, False
        pending = self._held + text
        state, automaton = self._state, self._automaton
        for index, character in enumerate(text, start=len(self._held) + 1):
            state = automaton.step(state, character)
            found = automaton.match_length[state]
            if found:
                self._stopped, self._held = True, ""
                return pending[: index - found], True
        free = len(pending) - automaton.depth[state]
        self._state, self._held = state, pending[free:]
        return pending[:free], False

    def flush(self) -> str:
        """Ends the text. Returns what was held back and did not become a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held


@functools.lru_cache(maxsize=32)
def _automaton(strings: tuple[str, ...]) -> _Automaton:
    """The automaton, which may take a megabyte. The completions of one request share it."""
    return _Automaton(strings)


class _Automaton:
    """Its states are the prefixes of the strings; state 0 is the empty prefix.

    `depth` has the length of each prefix, and `match_length` that of the longest string with which it ends (0: none).
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.depth = [0]
        self.match_length = [0]
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        for string in strings:
            self._add(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match_length.append(0)
            state = self._next[state][character]
        self.match_length[state] = len(string)

    def _link(self) -> None:
        """Sets each state's fallback, the longest proper end of its prefix that is a state, too; short ones first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if not self.match_length[state]:
                self.match_length[state] = self.match_length[self._fallback[state]]
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                queue.append(child)
