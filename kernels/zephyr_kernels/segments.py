"""A segment: which queries of a row see which keys. What attention is planned from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Spans of one segment, in tokens.

    q_start, q_len: its queries, among the U. k_start: where its own keys begin, among the T; they
    end with its last query's token. lead: own keys before the first query. c_start, c_len: context.
    """

    q_start: int
    q_len: int
    k_start: int
    lead: int = 0
    c_start: int = 0
    c_len: int = 0
