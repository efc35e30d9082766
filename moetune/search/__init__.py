"""Decides which tactics are timed next. A search yields batches and receives their times; it measures nothing."""
