"""Recordings of routed tokens: reads the files of engines, and writes moetune's own."""
