"""The paper's networks: ``create(name, **options)`` builds one, ``list_models()`` names them all."""

from redconvert.zoo.i3d_kinetics import I3DKinetics
from redconvert.zoo.labels import kinetics400_classes
from redconvert.zoo.registry import create, list_models, register_model

# The builder functions stay in their modules: `redconvert.zoo.i3d_kinetics` is the module, not the function.
__all__ = ["I3DKinetics", "create", "kinetics400_classes", "list_models", "register_model"]
