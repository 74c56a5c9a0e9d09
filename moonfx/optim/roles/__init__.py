"""Which parameters Muon steps: by the user's word, the graph, module types, names, shapes."""
