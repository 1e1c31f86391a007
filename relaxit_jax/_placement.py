"""Placement of arrays: equal types inside `jax.shard_map` and equal shardings on explicit meshes."""

import jax
import jax.numpy as jnp


def placed(x, *others):
    """Place x as the others are placed.

    An array made from a shape, such as noise or zeros, is replicated on every device. Loops, `where` and
    custom derivative rules need equal types. A type includes the shard_map axes along
    which an array varies and, on an explicit mesh, its sharding.
    """
    x = vary_as(x, *others)
    spec = spec_of(jnp.shape(x), *others)
    return x if spec is None or spec == jax.typeof(x).sharding.spec else jax.sharding.reshard(x, spec)


def vary_as(x, *others):
    """Mark x as varying along the shard_map axes of the others."""
    own, *rest = (jax.typeof(y).manual_axis_type.varying for y in (x, *others))
    axes = frozenset().union(*rest) - own
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def where(condition, x, y):
    """`jnp.where` that first gives its three arguments the same sharding, as an explicit mesh requires."""
    three = condition, x, y
    shape = jnp.broadcast_shapes(*map(jnp.shape, three))
    spec = spec_of(shape, *three)
    if spec is not None:
        three = [jax.sharding.reshard(jnp.broadcast_to(a, shape), spec) if jnp.ndim(a) else a for a in three]
    return jnp.where(*three)


def rows_of(x, index):
    """`x[index]` along the first axis, which is not sharded.

    An explicit mesh needs the sharding of the result if vmap has put a sharded batch before `index`.
    """
    spec = jax.typeof(x).sharding.spec
    explicit = jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return x.at[index].get(out_sharding=jax.sharding.PartitionSpec(None, *spec[1:])) if explicit else x[index]


def rows_at(table, index):
    """`table[index]` along the first axis, sharded like `index`; NaN for an index outside the table."""
    spec = spec_of((*index.shape, 1), index[..., None])
    spec = spec and jax.sharding.PartitionSpec(*spec[:-1], *[None] * (table.ndim - 1))
    index = where(index < 0, len(table), index)  # a negative one would count from the end
    return table.at[index].get(mode="fill", fill_value=jnp.nan, out_sharding=spec)


def spec_of(shape, *others):
    """The sharding of an array of this shape combined with the others; None without an explicit mesh."""
    spec = [None] * len(shape)
    for y in map(jax.typeof, others):
        for axis in range(-min(len(shape), y.ndim), 0):
            names = y.sharding.spec[axis]
            if names and spec[axis] is None and names not in spec and y.shape[axis] == shape[axis]:
                spec[axis] = names
    return jax.sharding.PartitionSpec(*spec) if any(spec) else None


def whole(function, x, *others):
    """Call a function that has no sharding rule on explicit meshes; the result is sharded like x."""
    spec = spec_of(x.shape, x)
    return (function if spec is None else jax.sharding.auto_axes(function, out_sharding=spec))(x, *others)
