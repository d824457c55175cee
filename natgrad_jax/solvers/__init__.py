"""Solvers of (F + damping I) d = g, one a file."""

from natgrad_jax.solvers._solver import Report as Report
from natgrad_jax.solvers._solver import Solver as Solver
from natgrad_jax.solvers.block_diagonal import block_diagonal as block_diagonal
from natgrad_jax.solvers.cg import CGState as CGState
from natgrad_jax.solvers.cg import cg as cg
from natgrad_jax.solvers.cholesky import cholesky as cholesky
from natgrad_jax.solvers.diagonal import diagonal as diagonal
from natgrad_jax.solvers.ekfac import EKFACState as EKFACState
from natgrad_jax.solvers.ekfac import ekfac as ekfac
from natgrad_jax.solvers.kfac import KFACState as KFACState
from natgrad_jax.solvers.kfac import kfac as kfac
from natgrad_jax.solvers.qr import qr as qr
from natgrad_jax.solvers.spectral import spectral as spectral
from natgrad_jax.solvers.woodbury import woodbury as woodbury
