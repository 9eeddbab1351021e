"""Cameras without a graphics library: one ray per pixel, `mujoco.mj_multiRay`, Lambert shading from surface normals.

Needs no EGL, OSMesa or display and gives the same pixels on every machine.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco is a binary module without type stubs.

import mujoco
import numpy as np

_LIGHT = np.array([-0.25, -0.45, 0.86])
"""Direction towards the light, unit length to two digits: from the left, behind the front camera."""
_AMBIENT, _DIFFUSE = 0.45, 0.62


class RayCamera:
    """A pinhole camera of the model; ray directions are computed once.

    Args:
        model: compiled scene; supplies the vertical field of view.
        name: name of a camera in the model.
        image_size: height and width in pixels.

    Raises:
        ValueError: the model has no such camera, or a side of the image is not positive.
    """

    def __init__(self, model: mujoco.MjModel, name: str, image_size: tuple[int, int]) -> None:
        height, width = image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be positive (height, width), got {image_size}")
        self.id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
        if self.id < 0:
            names = [model.camera(i).name for i in range(model.ncam)]
            raise ValueError(f"unknown camera {name!r}; the scene has {names}")
        self.image_size = image_size
        half = np.tan(np.radians(model.cam_fovy[self.id]) / 2)
        # Pixel centres; rows run down the image, the camera looks along its -z.
        y, x = np.meshgrid(
            half * (1 - (2 * np.arange(height) + 1) / height),
            half * width / height * ((2 * np.arange(width) + 1) / width - 1),
            indexing="ij",
        )
        rays = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3)
        self._rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
        self._world_rays = self._rays
        self._rotation = np.full(9, np.nan)
        count = height * width
        self._geom = np.empty(count, dtype=np.int32)
        self._distance = np.empty(count)
        self._normal = np.empty((count, 3))

    def render(self, model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
        """The camera's image, uint8 [H, W, 3]; needs `mj_kinematics` and `mj_camlight` to be up to date."""
        rotation = data.cam_xmat[self.id]
        if not np.array_equal(rotation, self._rotation):
            # Written out instead of `@`: BLAS may round differently from machine to machine.
            axes = rotation.reshape(3, 3)
            rays = self._rays
            self._world_rays = rays[:, :1] * axes[:, 0] + rays[:, 1:2] * axes[:, 1] + rays[:, 2:] * axes[:, 2]
            self._rotation = rotation.copy()
        mujoco.mj_multiRay(
            model,
            data,
            data.cam_xpos[self.id],
            self._world_rays.reshape(-1),
            None,
            True,
            -1,
            self._geom,
            self._distance,
            self._normal.reshape(-1),
            len(self._geom),
            mujoco.mjMAXVAL,
        )
        normal = self._normal
        lambert = normal[:, 0] * _LIGHT[0] + normal[:, 1] * _LIGHT[1] + normal[:, 2] * _LIGHT[2]
        light = np.where(self._geom >= 0, _AMBIENT + _DIFFUSE * np.maximum(lambert, 0), 0)  # rays into the void: black
        color = model.geom_rgba[self._geom, :3] * light[:, None]
        return (np.clip(color, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(*self.image_size, 3)
