"""LIBERO's cameras, fast enough for a CPU: one renderer, without shadows, reflections and multisampling.

Everything else is LIBERO's own picture: same cameras, lights and textures, collision shapes hidden.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco is a binary module without type stubs.

import atexit

import mujoco
import numpy as np

from openpi_ar.errors import UserError

_COLLISION, _HIDDEN = 0, 5
"""Groups of geoms: robosuite's collision shapes, and one that nothing is in and MuJoCo does not draw."""


class Cameras:
    """Renders fixed cameras of one model. Close it before making another: some GL libraries bear one per process.

    Args:
        model: compiled scene; its quality settings are changed.
        cameras: names of cameras in the model.
        image_size: height and width in pixels.

    Raises:
        UserError: there is no way to draw without a display.
    """

    def __init__(self, model: mujoco.MjModel, cameras: tuple[str, ...], image_size: tuple[int, int]) -> None:
        height, width = image_size
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except Exception as e:  # GL libraries raise whatever they like
            raise UserError(
                f"MuJoCo cannot draw: {e}. Install EGL or OSMesa (apt-get install libegl1 libosmesa6) and set "
                "MUJOCO_GL=egl or MUJOCO_GL=osmesa before Python starts"
            ) from e
        # It runs before MuJoCo's own handler, which ends the display that the context is freed from.
        atexit.register(self.close)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False
        self._option = mujoco.MjvOption()
        self._option.geomgroup[_COLLISION] = 0
        self._model, self._ids = model, [model.camera(name).id for name in cameras]
        self._aspect = width / height

    def render(self, data: mujoco.MjData) -> list[np.ndarray]:
        """The image of each camera, uint8 [h w 3], the right way up."""
        images = []
        groups = self._model.geom_group.copy()
        for camera in self._ids:
            # Most of the time goes into vertices, and MuJoCo sends those out of sight too.
            self._model.geom_group[self._out_of_sight(data, camera)] = _HIDDEN
            self._renderer.update_scene(data, camera, scene_option=self._option)
            self._model.geom_group[:] = groups
            images.append(self._renderer.render())
        return images

    def close(self) -> None:
        """Free the GL context."""
        self._renderer.close()
        atexit.unregister(self.close)

    def _out_of_sight(self, data: mujoco.MjData, camera: int) -> np.ndarray:
        """bool [geoms]: the sphere around the geom lies wholly behind one of the picture's four sides."""
        half = np.tan(np.radians(self._model.cam_fovy[camera]) / 2)
        offset = (data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
        radius = self._model.geom_rbound
        hidden = np.zeros(len(radius), bool)
        for axis, slope in ((0, half * self._aspect), (1, half)):
            # The camera looks along -z: inside, |x| < -z * slope. Distance to that plane, times its normal's length.
            beyond = np.abs(offset[:, axis]) + offset[:, 2] * slope
            hidden |= beyond > radius * np.hypot(1, slope)
        return hidden & (radius > 0)  # planes have no radius
