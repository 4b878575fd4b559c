"""kvz inside other libraries, a module for each. None is imported before it is asked for."""
