"""The RAPIDS backend: cuDF, cuML, cuVS, CuPy. Twin of `headrace.gpu.host`, module by module."""
