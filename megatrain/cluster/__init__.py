"""Who and where am I (torchrun, srun, mpirun, alone), how ranks find each other, and how local ranks are started."""
