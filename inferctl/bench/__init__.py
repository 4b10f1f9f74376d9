"""Plan to report: load, measure, judge with statistics, and say what is not known."""
