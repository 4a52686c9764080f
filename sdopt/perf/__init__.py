"""Speed over time: nightly runs, their history, and the gate that says when something became worse."""
