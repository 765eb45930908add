"""One optimiser step on one batch. Engines differ in how they share the work, never in what comes out."""
