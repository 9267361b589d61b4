"""One file a part of the suite: `PART` says what it is, `cases(bench)` what it measures."""
