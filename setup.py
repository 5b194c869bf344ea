"""What pyproject.toml can't say: a wheel holds qlora_lib alone, an editable install finds the
course beside the notebooks and the experiments too."""

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel


class WithTheCourse(editable_wheel):
    def run(self):
        self.distribution.packages += find_packages("notebooks") + find_packages(
            include=["experiments*"]
        )
        self.distribution.package_dir = {"course": "notebooks/course"}
        super().run()


setup(
    packages=find_packages(include=["qlora_lib*"]), cmdclass={"editable_wheel": WithTheCourse}
)
