"""From a path to a model: parse, plan memory, build the engine, attach it."""
