"""Facts about any FX graph: operators, aliases, memory versions, modes, order; not attention."""
