from .backend import BACKEND as BACKEND
